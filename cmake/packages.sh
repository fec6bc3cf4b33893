# shellcheck shell=bash
# For the run scripts, which source it: installs what is missing on Debian and its kin.

say() { printf '\n== %s\n' "$*"; }

# install_missing WHAT...   WHAT is a package, or command:package where any program of that name will do.
install_missing() {
  local what missing=() as_root=()
  for what in "$@"; do
    if [[ $what == *:* ]]; then
      command -v "${what%%:*}" >/dev/null || missing+=("${what#*:}")
    elif [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$what" 2>/dev/null) != installed ]]; then
      missing+=("$what")
    fi
  done
  if ((${#missing[@]} == 0)); then
    say "Every package this needs is installed"
    return
  fi
  if ! command -v apt-get >/dev/null; then
    say "This machine has no apt-get; going on without what Debian calls: ${missing[*]}"
    return
  fi
  say "Installing ${missing[*]}"
  if ((EUID != 0)); then
    command -v sudo >/dev/null || { echo "neither root nor sudo: please install ${missing[*]} and call this again" >&2; return 1; }
    as_root=(sudo)
  fi
  "${as_root[@]}" apt-get update -qq || echo "The list of packages could not be renewed; trying with the one there is." >&2
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
    { echo "could not install ${missing[*]}: the reason stands above" >&2; return 1; }
}
