#compdef nbdlink
# Completion of nbdlink for zsh.
#
# The program itself tells what fits: first a line that says whether files or folders do and
# whether no space is to follow, then a word, a tab and what it means for each. It says nothing
# when something is wrong.

_nbdlink() {
    local -a said values shown space
    local line
    said=("${(@f)$("${(Q)words[1]}" complete zsh "${(@Q)words[2,CURRENT]}" 2>/dev/null </dev/null)}")
    for line in "${(@)said[2,-1]}"; do
        [[ -n $line ]] || continue
        values+=("${line%%$'\t'*}")
        shown+=("${line/$'\t'/  -- }")
    done
    [[ $said[1] == *nospace* ]] && space=(-S '')
    if (( $#values )); then
        compadd -l -d shown $space -- "${(@)values}" && return
    fi
    case $said[1] in
    # What comes behind --option= or NAME= is a file as well.
    *files*) _files || { compset -P 1 '*=' && _files } ;;
    *folders*) _files -/ || { compset -P 1 '*=' && _files -/ } ;;
    *) return 1 ;;
    esac
}

if [[ $funcstack[1] == _nbdlink ]]; then
    _nbdlink "$@"
else
    compdef _nbdlink nbdlink
fi
