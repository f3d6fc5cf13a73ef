#!/usr/bin/env bash
# Makes this machine run the SIMPLER scene: software Vulkan (Mesa's lavapipe) and the `simpler` extra.
# Use: make simpler-setup   (as root, or with sudo). Running it again does nothing that is done already.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
check=(env PYTHONWARNINGS=ignore "$python" -m selfflow.envs.sapien_render)

fail() { echo "simpler-setup: $*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo "$@"
    else fail "needs root for: $*"; fi
}

# Debian 12's own Mesa (22.3) cannot run SAPIEN; its backports suite has 25.0. The new source is the
# machine's own Debian source with another suite, so whichever mirror is in use stays in use.
add_backports() {
    local target=/etc/apt/sources.list.d/selfflow-backports.sources list
    grep -qsr bookworm-backports /etc/apt/sources.list /etc/apt/sources.list.d && return
    for list in /etc/apt/sources.list.d/*.sources; do
        [ -e "$list" ] || continue
        local stanza
        stanza=$(awk 'BEGIN { RS = "" } /(^|\n)Suites:[^\n]* bookworm( |\n|$)/ && !/-security/ { print; exit }' "$list" \
            | sed -e '/^#/d' -e 's/^Suites:.*/Suites: bookworm-backports/')
        [ -n "$stanza" ] && { echo "$stanza" | as_root tee "$target" >/dev/null; return; }
    done
    local line
    line=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null \
        | sed -nE 's/^(deb( +\[[^]]*\])? +[^ ]+) +bookworm( .*)$/\1 bookworm-backports\3/p' | head -n 1)
    [ -n "$line" ] || fail "found no Debian 12 source under /etc/apt to derive bookworm-backports from"
    echo "$line" | as_root tee "${target%.sources}.list" >/dev/null
}

install() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 install -y \
        --no-install-recommends "$@" >/dev/null || fail "apt-get could not install $*"
}

install_vulkan() {
    command -v apt-get >/dev/null || fail "no apt-get: install a Vulkan driver (lavapipe of Mesa 25) by hand"
    local suite=()
    # shellcheck disable=SC1091
    . /etc/os-release
    if [ "$ID" = debian ] && [ "${VERSION_CODENAME:-}" = bookworm ]; then
        add_backports
        suite=(-t bookworm-backports)
    fi
    as_root apt-get -qq update
    install libvulkan1 libegl1 libgl1 libgles2
    install "${suite[@]}" mesa-vulkan-drivers
}

[ -x "$python" ] || fail "no .venv here: run make test or make rollout once first"
if ! "$python" -c "import sapien" 2>/dev/null; then
    constraints=()
    [ -e constraints.txt ] && constraints=(-c constraints.txt)
    "$python" -m pip install -q -e '.[simpler]' "${constraints[@]}"
fi
if ! "${check[@]}" 2>/dev/null; then
    install_vulkan
    "${check[@]}" || fail "no frame could be rendered; the line above says why"
fi
