# shellcheck shell=bash
# What the launchers share; sourced by them, never run.

dry_run=

# The comment at the head of the script, up to the first empty line.
usage() {
  sed -n -e '2,/^$/s/^# \{0,1\}//p' "$0"
}

# Ends with exit code 2, and says why.
die() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# Ends with an error that names those of the variables that are empty.
need() {
  local name missing=
  for name in "$@"; do
    [[ ${!name:-} ]] || missing+=" $name"
  done
  [[ ! $missing ]] || die "set$missing in the environment; ${0##*/} --help says what each is"
}

# One line that any POSIX shell reads as these words.
quote() {
  local word rest line=
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*)
        rest=$word word="'"
        while [[ $rest == *\'* ]]; do # every ' becomes '\''
          word+="${rest%%\'*}'\\''"
          rest=${rest#*\'}
        done
        word+="$rest'"
        ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command, or prints it in a dry run.
perform() {
  if [[ $dry_run ]]; then
    quote "$@"
  else
    "$@"
  fi
}

# Every setting comes from the environment; words after a subcommand that takes none are a mistake.
no_more() {
  [[ $# -eq 0 ]] || die "what is '$1'? Flags go before the subcommand, settings into the environment (--help)"
}
