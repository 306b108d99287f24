#!/bin/sh
# Starts one host's share of a job on several hosts: run it on each of them, with the same words but for --node-rank.
#
#   launch/multinode.sh --nodes 2 --node-rank 0 --head 10.0.0.1 -- launch/train.py --steps 400     on the host 10.0.0.1
#   launch/multinode.sh --nodes 2 --node-rank 1 --head 10.0.0.1 -- launch/train.py --steps 400     on the other
#
# It is torchrun with what several hosts need: the interface by which they reach each other, one host that keeps the
# store, time-outs, logs. docs/multinode.md has the rest, and files for Slurm, Kubernetes and a DeepSpeed hostfile.
set -eu

usage() {
    cat <<'WORDS'
usage: launch/multinode.sh --nodes N|MIN:MAX --node-rank K --head ADDRESS [options] -- SCRIPT ARGUMENTS
       launch/multinode.sh --hostfile FILE [options] -- SCRIPT ARGUMENTS

  --nodes N|MIN:MAX         how many hosts take part; MIN:MAX goes on with fewer when some are lost, and takes them back
  --node-rank K             which of them this is, from 0, the head
  --head ADDRESS            of the host that keeps the store: an IPv4 address or a name, the same on all hosts
  --hostfile FILE           of DeepSpeed's form, instead of these: the first line is the head, slots its processes
  --nproc-per-node auto|P   processes on this host; auto: one for each GPU, or for each core (default: auto)
  --port PORT               of the store, on the head (default: 29400)
  --max-restarts R          how often to start all processes again after one failed (default: 0)
  --logs FOLDER             what each process says, in a file of its own, besides the console
  --last-call SECONDS       once MIN hosts are there, how long to wait for more (default: 15)
  --timeout SECONDS         how long to wait for the head and for the other hosts (default: 300)
  --dry-run                 say what would be done, and do not
WORDS
}

fail() {
    echo "error: $1" >&2
    exit 2
}

whole() {
    case $2 in '' | *[!0-9]*) fail "$1 takes a whole number, not \"$2\"" ;; esac
}

nodes='' node_rank='' head='' hostfile='' logs='' dry_run=''
nproc=auto port=29400 max_restarts=0 timeout=300 last_call=15
while [ $# -gt 0 ]; do
    case $1 in
        --) break ;;
        --help | -h) usage && exit 0 ;;
        --dry-run) dry_run=1 && shift && continue ;;
        --*=*) name=${1%%=*} value=${1#*=} && shift ;;
        --*)
            name=$1
            [ $# -gt 1 ] || fail "$1 needs a value"
            value=$2
            shift 2
            ;;
        *) fail "$1 is not expected here; the script and its arguments come after --" ;;
    esac
    case $name in
        --nodes) nodes=$value ;;
        --node-rank) node_rank=$value ;;
        --head) head=$value ;;
        --hostfile) hostfile=$value ;;
        --nproc-per-node) nproc=$value ;;
        --port) port=$value ;;
        --max-restarts) max_restarts=$value ;;
        --logs) logs=$value ;;
        --timeout) timeout=$value ;;
        --last-call) last_call=$value ;;
        *) fail "$name is no option; --help lists them" ;;
    esac
done
[ $# -gt 1 ] || fail "what is to be started? give the script and its arguments after --"
shift

# A line of the hostfile is NAME slots=P; which of them this host is, its name or one of its addresses says.
if [ -n "$hostfile" ]; then
    [ -r "$hostfile" ] || fail "there is no file $hostfile"
    lines=$(sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$hostfile")
    nodes=${nodes:-$(printf '%s\n' "$lines" | grep -c .)} || fail "$hostfile names no host"
    head=${head:-$(printf '%s\n' "$lines" | awk 'NR == 1 { print $1 }')}
    mine=" $(hostname) $(hostname -s 2>/dev/null || true) $(hostname -I 2>/dev/null || true) "
    node_rank=${node_rank:-$(printf '%s\n' "$lines" | awk -v mine="$mine" 'index(mine, " " $1 " ") { print NR - 1; exit }')}
    [ -n "$node_rank" ] || fail "$hostfile does not name this host ($(hostname)); say which it is by --node-rank"
    slots=$(printf '%s\n' "$lines" | awk -v row="$node_rank" 'NR == row + 1 { sub(/.*slots=/, ""); print $1 }')
    [ "$nproc" != auto ] || nproc=${slots:-auto}
fi
for given in "--nodes $nodes" "--node-rank $node_rank" "--head $head"; do
    [ -n "${given#* }" ] || fail "${given% *} is missing; --help says what it is"
done
min_nodes=${nodes%:*} max_nodes=${nodes#*:}
whole --nodes "$min_nodes" && whole --nodes "$max_nodes" && whole --node-rank "$node_rank"
whole --port "$port" && whole --max-restarts "$max_restarts" && whole --timeout "$timeout" && whole --last-call "$last_call"
[ "$nproc" = auto ] || whole --nproc-per-node "$nproc"
[ "$min_nodes" -ge 1 ] && [ "$max_nodes" -ge "$min_nodes" ] || fail "--nodes $nodes: at least 1, and MIN no more than MAX"
[ "$node_rank" -lt "$max_nodes" ] || fail "--node-rank $node_rank: of $max_nodes hosts the last is $((max_nodes - 1))"

here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
way=$("$python" "$here/reach.py" --node-rank "$node_rank" --head "$head" --port "$port" \
    --timeout "$([ -z "$dry_run" ] && echo "$timeout" || echo 0)") || exit 2
# shellcheck disable=SC2086  # three words
set_way() { interface=$1 local_address=$2 head_address=$3; } && set_way $way

chosen=$interface
[ -z "${GLOO_SOCKET_IFNAME:-}${NCCL_SOCKET_IFNAME:-}" ] || interface="$interface, but the environment has said another"
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$chosen}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$chosen}"
# A collective of NCCL's that failed or timed out ends its process, where it would wait for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
again="a failure ends the job"
if [ "$max_restarts" -gt 0 ] || [ "$min_nodes" -lt "$max_nodes" ]; then
    # Each start gets a store of its own: in one that is kept, ranks would find the addresses of the dead.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
    again="up to $max_restarts failures start it again, each with a new store"
fi
is_host=0 role="the store is on the head, $head_address port $port"
[ "$node_rank" -gt 0 ] || { is_host=1 && role="this is the head and keeps the store, port $port"; }

cat <<WORDS
host $node_rank of $nodes: $(hostname), $nproc processes
address $local_address, interface $interface (GLOO $GLOO_SOCKET_IFNAME, NCCL $NCCL_SOCKET_IFNAME)
$role
waits ${timeout} s for the hosts; $again
logs ${logs:-on the console alone}
WORDS

set -- --nnodes "$nodes" --node-rank "$node_rank" --nproc-per-node "$nproc" --max-restarts "$max_restarts" \
    --rdzv-backend c10d --rdzv-endpoint "$head_address:$port" --rdzv-id multinode --local-addr "$local_address" \
    --rdzv-conf "is_host=$is_host,join_timeout=$timeout,read_timeout=$((timeout < 60 ? timeout : 60)),last_call_timeout=$last_call" \
    --monitor-interval 1 "$@"
[ -z "$logs" ] || set -- --log-dir "$logs/host$node_rank" --redirects 3 --tee 3 "$@"
if [ -n "$dry_run" ]; then
    echo "$python $here/agent.py $*"
    exit 0
fi
exec "$python" "$here/agent.py" "$@"
