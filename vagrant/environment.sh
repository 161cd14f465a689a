#!/bin/sh
# On a machine, as root: make /nbdlink/.venv, in which nbdlink and its tests run on the modules of
# Debian's packages.
#
# With modules from pip it takes ten minutes where there is no KVM. make-box.sh runs this in the
# box as well, where nbdlink is not yet. Nothing happens when all of it is there.
set -eu

cd /nbdlink
wanted=vagrant/requirements.txt
if ! cmp -s "$wanted" .venv/requirements.txt; then
    python3 -m venv --system-site-packages --clear .venv
    # What is never imported needs no bytecode.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r "$wanted"
    cp "$wanted" .venv/requirements.txt
fi
[ -e pyproject.toml ] || exit 0
if [ ! .venv/bin/nbdlink -nt pyproject.toml ]; then
    # Debian's setuptools builds it, instead of one that pip would fetch for that alone.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
        --no-deps --no-build-isolation --editable .
fi
ln -sf /nbdlink/.venv/bin/nbdlink /usr/local/bin/nbdlink
