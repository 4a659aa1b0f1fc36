#!/usr/bin/env bash
# stop.sh DIR: ends the cluster that start.sh DIR started: its jobs, then its daemons, each by its own pid file.
set -uo pipefail
export LC_ALL=C PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/common.sh"
[ $# -eq 1 ] || die "usage: stop.sh DIR"
[ -d "$1" ] || exit 0
DIR=$(cd "$1" && pwd -P)
export SLURM_CONF="$DIR/slurm.conf"

alive() { grep -q '^State:[[:space:]]*[^ZX]' "/proc/$1/status" 2>/dev/null; }

stop() { # NAME SECONDS: ask, wait, then make it
    local pid left=$(($2 * 20))
    pid=$(pid_of "$1") || return 0
    kill "$pid" 2>/dev/null
    while alive "$pid" && [ $left -gt 0 ]; do
        left=$((left - 1))
        sleep 0.05
    done
    ! alive "$pid" || { say "$1 did not end in $2 s, killing it"; kill -9 "$pid"; }
    rm -f "$DIR/run/$1.pid"
}

left_over() { # step daemons that hold one of our logs open
    local process
    for process in /proc/[0-9]*; do
        [[ "$(readlink "$process/exe" 2>/dev/null)" == */slurmstepd ]] || continue
        ! ls -l "$process/fd" 2>/dev/null | grep -qF -- "$DIR/" || echo "${process#/proc/}"
    done
}

if pid_of slurmctld >/dev/null; then
    timeout 20 squeue -h -o %A 2>/dev/null | sort -u | xargs -r timeout 20 scancel --quiet 2>/dev/null
    for _ in $(seq 150); do
        [ -n "$(timeout 5 squeue -h -o %A 2>/dev/null)" ] || break
        sleep 0.1
    done
fi
for file in "$DIR"/run/slurmd.*.pid; do
    name=${file##*/}
    stop "${name%.pid}" 10
done
stop slurmctld 20
for pid in $(left_over); do
    say "ending a left-over step daemon ($pid) and its tasks"
    kill -9 $(cat /proc/"$pid"/task/*/children 2>/dev/null) "$pid" 2>/dev/null
done
stop slurmdbd 15
stop mariadbd 30
stop munged 5
exit 0
