# Shared by start.sh and stop.sh: whose processes are ours. Needs DIR.

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# The pid of our daemon NAME, if it runs. A pid file that a crash or a reboot left is not believed: the process must name
# DIR in its command line or carry our SLURM_CONF.
pid_of() {
    local pid
    pid=$(tr -dc 0-9 2>/dev/null <"$DIR/run/$1.pid") && [ -n "$pid" ] && [ -r "/proc/$pid/environ" ] || return 1
    grep -qaF -- "$DIR/" "/proc/$pid/cmdline" || grep -qazxF -- "SLURM_CONF=$DIR/slurm.conf" "/proc/$pid/environ" || return 1
    echo "$pid"
}

wait_for() { # SECONDS WHAT COMMAND...
    local left=$(($1 * 10)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        left=$((left - 1))
        [ $left -gt 0 ] || die "$what did not come up; logs are in $DIR/log"
        sleep 0.1
    done
}
