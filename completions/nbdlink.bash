# Completion of nbdlink for bash.
#
# The program itself tells what fits: first a line that says whether files or folders do and
# whether no space is to follow, then a line for each word. It says nothing when something is wrong.

_nbdlink() {
    local -a said
    COMPREPLY=()
    mapfile -t said < <("${COMP_WORDS[0]}" complete bash \
        "$COMP_LINE" "$COMP_POINT" "$COMP_WORDBREAKS" 2>/dev/null </dev/null)
    COMPREPLY=("${said[@]:1}")
    case ${said[0]-} in *nospace*) compopt -o nospace ;; esac
    case ${said[0]-} in *files*) compopt -o filenames -o default ;; esac
    case ${said[0]-} in *folders*) compopt -o filenames -o dirnames ;; esac
} 2>/dev/null

complete -F _nbdlink nbdlink
