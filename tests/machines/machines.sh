#!/usr/bin/env bash
# Several "machines" out of one, for tests: network namespaces on a bridge, each with processes, a hostname, a home, /tmp/ray,
# /dev/shm and an sshd of its own, so that `ray stop` and kill -9 reach only it. Root and CAP_NET_ADMIN; iproute2, openssh-server.
#
#   machines.sh up N DIR        machines at 10.78.0.1 .. N; the key to log in with as root is DIR/id; this host is 10.78.0.254
#   machines.sh start I DIR     one machine again, as after a power cut: its home is kept
#   machines.sh kill I DIR      its power is cut
#   machines.sh cut I           its cable is cut        machines.sh mend I
#   machines.sh run I DIR COMMAND...    in its namespaces
#   machines.sh down DIR        everything away
set -eu
BRIDGE=tdbr0 PREFIX=10.78.0 NAME=tdm

start() { # I DIR
    local i=$1 dir=$2 home=$2/home$1
    mkdir -p "$home/.ssh" /run/sshd
    cp "$dir/id.pub" "$home/.ssh/authorized_keys"
    chmod 700 "$home" "$home/.ssh"
    touch "$home/.bashrc" "$home/.profile"
    printf 'HostKey %s/host_key\nAuthorizedKeysFile %s/.ssh/authorized_keys\nPermitRootLogin prohibit-password\nStrictModes no\nPidFile none\nUsePAM no\n' \
        "$dir" "$HOME" >"$dir/sshd_config"
    local keep=${PYENV_ROOT:-$HOME/.pyenv} # an interpreter that lives in the home has to be in the new one too
    ip netns exec "$NAME$i" unshare --mount --pid --uts --ipc --fork --mount-proc --kill-child bash -c "
        hostname $NAME$i
        mkdir -p /tmp/ray; mount -t tmpfs -o size=1g tmpfs /tmp/ray; mount -t tmpfs -o size=1g tmpfs /dev/shm
        if [ -d '$keep' ]; then mkdir -p '$home/.pyenv'; mount --bind '$keep' '$home/.pyenv'; fi
        mount --bind '$dir/hosts' /etc/hosts; mount --bind '$dir/resolv.conf' /etc/resolv.conf
        mount --rbind '$home' '$HOME'
        exec /usr/sbin/sshd -D -e -f '$dir/sshd_config' -o ListenAddress=$PREFIX.$i" </dev/null >>"$dir/sshd$i.log" 2>&1 &
    echo $! >"$dir/machine$i.pid"
}

clear() { # a namespace goes with its last process, and takes its cable along only then
    for name in $(ip netns list | grep -oE "^$NAME[0-9]+"); do ip netns del "$name"; done
    for cable in $(ip -o link show type veth | grep -oE "${NAME}v[0-9]+"); do ip link del "$cable" 2>/dev/null || true; done
    ip link del $BRIDGE 2>/dev/null || true
}

case ${1:?up N DIR | start I DIR | kill I DIR | cut I | mend I | run I DIR COMMAND | down DIR} in
up)
    clear
    mkdir -p "$3"
    [ -f "$3/id" ] || ssh-keygen -q -t ed25519 -N '' -f "$3/id"
    [ -f "$3/host_key" ] || ssh-keygen -q -t ed25519 -N '' -f "$3/host_key"
    # Names without a resolver: one that is not there costs every look-up ten seconds, and Ray gives its agent fifteen.
    echo "127.0.0.1 localhost" >"$3/hosts"
    for i in $(seq 1 "$2"); do echo "$PREFIX.$i $NAME$i" >>"$3/hosts"; done
    : >"$3/resolv.conf"
    ip link add $BRIDGE type bridge
    ip addr add $PREFIX.254/24 dev $BRIDGE
    ip link set $BRIDGE up
    for i in $(seq 1 "$2"); do
        ip netns add "$NAME$i"
        ip link add "${NAME}v$i" type veth peer name eth0 netns "$NAME$i"
        ip link set "${NAME}v$i" master $BRIDGE up
        ip -n "$NAME$i" addr add "$PREFIX.$i/24" dev eth0
        ip -n "$NAME$i" link set lo up
        ip -n "$NAME$i" link set eth0 up
        ip -n "$NAME$i" route add default via $PREFIX.254
        start "$i" "$3"
    done ;;
start) start "$2" "$3" ;;
kill) kill -9 "$(cat "$3/machine$2.pid")" ;; # unshare ignores SIGTERM; --kill-child takes all of the machine with it
cut) ip link set "${NAME}v$2" down ;;
mend) ip link set "${NAME}v$2" up ;;
run)
    i=$2 dir=$3
    shift 3
    nsenter --target "$(pgrep -P "$(cat "$dir/machine$i.pid")" | head -1)" --mount --pid --uts --ipc --net -- "$@" ;;
down)
    for file in "$2"/machine*.pid; do kill -9 "$(cat "$file")" 2>/dev/null || true; done
    sleep 0.5
    clear ;;
esac
