# Completion of nbdlink for fish.
#
# The program itself tells what fits: first a line that says whether files or folders do, then a
# word, a tab and what it means for each. It says nothing when something is wrong.

function __nbdlink_complete
    set -l words (commandline -opc)
    set -l typed (commandline -ct)
    # Without the quotes and backslashes, also where a quote is still open.
    set -l word (string unescape -- $typed)
    test -n "$typed"; or set word ''
    set -l said ($words[1] complete fish $words[2..-1] $word 2>/dev/null </dev/null)
    if test (count $said) -gt 1
        printf '%s\n' $said[2..-1]
    else if string match -q '*files*' -- $said[1]
        set -l found (__fish_complete_path $word)
        # What comes behind --option= or NAME= is a file as well.
        if test -z "$found"; and set -l parts (string split -m 1 = -- $word)
            set found $parts[1]=(__fish_complete_path $parts[2])
        end
        test -n "$found"; and printf '%s\n' $found
    else if string match -q '*folders*' -- $said[1]
        __fish_complete_directories $typed
    end
end

complete -c nbdlink -f -a '(__nbdlink_complete)'
