#!/usr/bin/env bash
# start.sh DIR: a real Slurm cluster of four emulated nodes on this machine, all of it under DIR.
#
# Installs Debian's packages if they are missing, starts munged, mariadbd, slurmdbd, slurmctld and one slurmd per node, and
# waits until every node is idle. Needs root. Run twice, it keeps what runs and brings back what does not.
# Then: . DIR/env.sh (sets SLURM_CONF); stop.sh DIR ends it.
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/common.sh"
[ $# -eq 1 ] || die "usage: start.sh DIR"
[ "$(id -u)" = 0 ] || die "must run as root (it gives each node a host name of its own)"
mkdir -p "$1"
DIR=$(cd "$1" && pwd -P)
chmod a+x "$DIR" # munged's socket must be reachable by every user
case "$DIR" in *[!A-Za-z0-9_./-]*) die "DIR may hold only letters, digits and _./- : $DIR" ;; esac
[ ${#DIR} -le 60 ] || die "DIR is too long for unix sockets (60 characters at most): $DIR"
NODES="node1 node2 node3 node4"

install_packages() {
    local command missing="" policy=/usr/sbin/policy-rc.d added=
    for command in munged slurmctld slurmd sbatch sacct slurmdbd mariadbd mariadb mariadb-install-db unshare mount hostname; do
        command -v $command >/dev/null || missing+=" $command"
    done
    [ -n "$missing" ] || return 0
    say "installing packages for$missing"
    # Keep the packages' own services from starting.
    if [ ! -e $policy ]; then printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && added=1; fi
    local code=0
    { apt-get -o Acquire::Retries=3 update && DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::Retries=3 install -y --no-install-recommends munge slurmctld slurmd \
        slurm-client slurmdbd mariadb-server-core mariadb-client-core util-linux mount hostname; } >"$DIR/apt.log" 2>&1 </dev/null || code=$?
    [ -z "$added" ] || rm -f $policy
    [ $code = 0 ] || { tail -n 20 "$DIR/apt.log" >&2; die "apt-get failed"; }
}

port_open() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

free_block() { # first of ten ports in a row that nobody listens on
    local base port
    for base in $(seq 17000 10 25000); do
        for port in $(seq "$base" $((base + 9))); do ! port_open "$port" || continue 2; done
        echo "$base"
        return
    done
    die "no free block of ports between 17000 and 25000"
}

configure() {
    local base
    [ ! -s "$DIR/slurm.conf" ] || return 0
    base=$(free_block)
    echo "$base" >"$DIR/run/port"
    sed -e "s|@DIR@|$DIR|g; s|@PORT@|$base|; s|@DBDPORT@|$((base + 2))|; s|@PORT1@|$((base + 5))|; s|@PORT4@|$((base + 8))|" \
        "$HERE/slurm.conf.in" >"$DIR/slurm.conf.new"
    mkdir -p "$DIR/gpu"
    ln -sf /dev/null "$DIR/gpu/gpu0"
    ln -sf /dev/null "$DIR/gpu/gpu1"
    sed -e "s|@DIR@|$DIR|g" "$HERE/gres.conf.in" >"$DIR/gres.conf"
    mv "$DIR/slurm.conf.new" "$DIR/slurm.conf"
    echo "export SLURM_CONF=$DIR/slurm.conf" >"$DIR/env.sh"
    { cat /etc/hosts; for node in $NODES; do echo "127.0.0.1 $node"; done; } >"$DIR/hosts"
}

start_munge() {
    pid_of munged >/dev/null && return
    [ -s "$DIR/run/munge.key" ] || (umask 077; head -c 128 /dev/urandom >"$DIR/run/munge.key")
    rm -f "$DIR"/run/munge.sock*
    munged --key-file="$DIR/run/munge.key" --socket="$DIR/run/munge.sock" --pid-file="$DIR/run/munged.pid" \
        --log-file="$DIR/log/munged.log" --seed-file="$DIR/run/munged.seed" 9>&-
}

sql() { mariadb --no-defaults --protocol=socket -S "$DIR/private/mysql.sock" -u root "$@"; }

start_database() {
    pid_of mariadbd >/dev/null && return
    if [ ! -e "$DIR/db/.made" ]; then
        rm -rf "$DIR/db"
        mkdir "$DIR/db"
        mariadb-install-db --no-defaults --datadir="$DIR/db" --user=root --skip-test-db --skip-name-resolve \
            --auth-root-authentication-method=normal --innodb-log-file-size=16M >"$DIR/log/mariadb-install.log" 2>&1 9>&-
        touch "$DIR/db/.made"
    fi
    # Reached only through a socket in a folder that root alone may enter.
    setsid mariadbd --no-defaults --user=root --datadir="$DIR/db" --socket="$DIR/private/mysql.sock" \
        --pid-file="$DIR/run/mariadbd.pid" --log-error="$DIR/log/mariadbd.log" --skip-networking --skip-name-resolve \
        --innodb-buffer-pool-size=64M --innodb-log-file-size=16M --innodb-lock-wait-timeout=900 \
        --innodb-flush-log-at-trx-commit=0 </dev/null >>"$DIR/log/mariadbd.out" 2>&1 9>&- &
    wait_for 60 mariadbd sql -e 'select 1'
}

start_accounting() {
    pid_of slurmdbd >/dev/null && return
    sql -e "create database if not exists slurm_acct"
    (
        umask 077
        cat >"$DIR/slurmdbd.conf" <<EOF
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$(($(cat "$DIR/run/port") + 2))
SlurmUser=root
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
EOF
    )
    MYSQL_UNIX_PORT="$DIR/private/mysql.sock" slurmdbd 9>&-
    wait_for 60 slurmdbd port_open "$(($(cat "$DIR/run/port") + 2))"
}

start_slurm() {
    pid_of slurmctld >/dev/null || slurmctld -f "$SLURM_CONF" 9>&- 2>"$DIR/log/slurmctld.err" ||
        die "slurmctld failed: $(cat "$DIR/log/slurmctld.err")"
    for node in $NODES; do
        pid_of "slurmd.$node" >/dev/null && continue
        mkdir -p "$DIR/spool/$node"
        # Its own host name, and /etc/hosts in which the nodes' names resolve, for this node's processes only.
        unshare --uts --mount --propagation slave sh -c \
            'hostname "$1" && mount --bind "$2/hosts" /etc/hosts && exec slurmd -f "$2/slurm.conf" -N "$1"' \
            sh "$node" "$DIR" 9>&- 2>"$DIR/log/slurmd.$node.err" || die "slurmd of $node failed: $(cat "$DIR/log/slurmd.$node.err")"
    done
}

usable() {
    local bad
    [ "$(sinfo -h -N -p main -o %T | grep -cE '^(idle|mixed|allocated|completing)$')" = 4 ] && return
    bad=$(sinfo -h -N -p main -t down,drain,fail -o %N | sort -u | paste -sd, -)
    [ -z "$bad" ] || scontrol update NodeName="$bad" State=RESUME
    return 1
}

registered() { sacctmgr -n -P show cluster format=cluster,controlport | grep -q '|[1-9]'; }

mkdir -p "$DIR"/{run,log,state,spool,private}
chmod 700 "$DIR/private"
exec 9>"$DIR/run/start.lock"
flock -w 120 9 || die "another start is under way"
install_packages
configure
export SLURM_CONF="$DIR/slurm.conf"
unset SLURM_JOB_ID SLURM_JOBID
start_munge
start_database
start_accounting
start_slurm
wait_for 60 "the nodes" usable
wait_for 30 "accounting" registered
say "ready: $(sinfo -h -p main -o '%D nodes %t'); . $DIR/env.sh"
