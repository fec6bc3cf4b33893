#!/usr/bin/env bash
# Paged moments, or checkpoints, under a limit that the kernel holds a process to:  under-a-limit.sh PROGRAM moments|checkpoints FOLDER
# In a control group whose memory is that of all else, 30 % of theirs, and 16 MiB for the program itself, a run that has them in files must
# end with the bits of one without a limit, and one that has them in memory must be killed.
set -euo pipefail
program=$1 what=$2 folder=$3
skip() { echo "SKIPPED: $1"; exit 0; }

mkdir -p "$folder"
[[ $(stat -f -c %T "$folder") != tmpfs ]] || skip "$folder is memory itself"
group= name=qdylora-paging-$what-$$
if [[ -f /sys/fs/cgroup/cgroup.controllers ]]; then
  parent=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)
  for parent in "$parent" /sys/fs/cgroup; do
    if grep -qw memory "$parent/cgroup.subtree_control" 2>/dev/null && mkdir "$parent/$name" 2>/dev/null; then group=$parent/$name; break; fi
  done
  limit=memory.max swap=memory.swap.max
elif [[ -f /sys/fs/cgroup/memory/memory.limit_in_bytes ]] && mkdir "/sys/fs/cgroup/memory/$name" 2>/dev/null; then
  group=/sys/fs/cgroup/memory/$name
  limit=memory.limit_in_bytes swap=memory.memsw.limit_in_bytes
fi
[[ -n $group ]] || skip "no control group for memory can be made here"
trap 'rmdir "$group"' EXIT

read -r kept moved < <("$program" "$what" bytes)
budget=$((kept + moved * 30 / 100 + 16 * 1024 * 1024))
echo "$budget" >"$group/$limit"
if [[ -f $group/$swap ]]; then echo "$([[ $swap == memory.swap.max ]] && echo 0 || echo "$budget")" >"$group/$swap"; fi
[[ $(wc -l </proc/swaps) -le 1 || -f $group/$swap ]] || skip "this kernel would swap instead"

limited() { (echo "$BASHPID" >"$group/cgroup.procs" && exec "$program" "$what" "$1"); }
expected=$("$program" "$what" memory)
paged=$(limited "$folder")
echo "$what $moved bytes, all else $kept, limit $budget: $paged, without one $expected"
[[ $paged == "$expected" ]] || { echo "the bits differ"; exit 1; }
result=0
limited memory || result=$?
[[ $result == 137 ]] || { echo "with its $what in memory the program ended with $result under the same limit, which shows nothing"; exit 1; }
