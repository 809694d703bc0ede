# For other scripts to source: which mirror the machine's own apt sources name.

readonly APT_DIR=/etc/apt

# Prints the first URI of the apt sources that serves suite $1, from deb822 files ("URIs:") or one-line lists ("deb ...").
uri_of_suite() {
    local suite=$1 files
    shopt -s nullglob
    files=("$APT_DIR"/sources.list.d/*.sources)
    if [ ${#files[@]} -gt 0 ]; then
        awk -v suite="$suite" '
            function finish(  i, n, words) {
                n = split(suites, words, " ")
                for (i = 1; i <= n && !found; i++)
                    if (words[i] == suite && types ~ /(^| )deb( |$)/ && enabled != "no") { print uris; found = 1 }
                types = uris = suites = enabled = field = ""
            }
            FNR == 1 || /^[ \t]*$/ { finish() }
            /^#/ || /^[ \t]*$/ { next }
            /^[^ \t]/ { field = tolower($0); sub(/:.*/, "", field); sub(/^[^:]*:/, "") }
            field == "types" { types = types " " $0 }
            field == "uris" && uris == "" { uris = $1 }
            field == "suites" { suites = suites " " $0 }
            field == "enabled" { enabled = tolower($1) }
            END { finish() }' "${files[@]}" | grep -m 1 . && return 0
    fi
    files=("$APT_DIR"/sources.list "$APT_DIR"/sources.list.d/*.list)
    for file in "${files[@]}"; do
        [ -r "$file" ] || continue
        sed -n 's/#.*//; s/^[ \t]*deb[ \t]\{1,\}\(\[[^]]*\][ \t]*\)\{0,1\}//p' "$file"
    done | awk -v suite="$suite" '$2 == suite { print $1; found = 1; exit } END { exit !found }'
}
