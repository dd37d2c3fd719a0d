#!/bin/sh
# Finds a Python for tools/bootstrap.py, or prints what to install. Usage: sh tools/bootstrap.sh VENV
# PYTHON=/path/to/python selects one.
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        exec "$candidate" tools/bootstrap.py "$1"
    fi
done
cat >&2 <<MESSAGE
error: longctx needs Python 3.11 or newer; none was found (tried: ${PYTHON:-python3 python3.13 python3.12 python3.11 python}).
  Debian, Ubuntu:  apt-get install python3 python3-dev python3-venv
  Fedora:          dnf install python3 python3-devel
  macOS:           brew install python
  elsewhere:       PYTHON=/path/to/python make ...
MESSAGE
exit 1
