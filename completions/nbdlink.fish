# Completion of nbdlink for fish.
#
# The program itself tells what fits: first a line that says whether files or folders do, then a
# word, a tab and what it means for each. It says nothing when something is wrong.

function __nbdlink_complete
    set -l words (commandline -opc)
    set -l word (commandline -ct)
    set -l said ($words[1] complete fish $words[2..-1] $word 2>/dev/null </dev/null)
    if test (count $said) -gt 1
        printf '%s\n' $said[2..-1]
    else if string match -q '*files*' -- $said[1]
        __fish_complete_path $word
    else if string match -q '*folders*' -- $said[1]
        __fish_complete_directories $word
    end
end

complete -c nbdlink -f -a '(__nbdlink_complete)'
