#!/usr/bin/env bash
# All that only a GPU can tell, on one GPU, in under 25 minutes, without network, into one file:
#
#   bash tests/on_gpu.sh                          # -> out/on_gpu/on_gpu.json: send this file back
#   PORT=/tmp/port bash tests/on_gpu.sh           # beside the port, too; see tests/vs_port.py
#   STORIES=stories.txt MINUTES=20 bash tests/on_gpu.sh     # then so long of a larger model on them
#   TINY=1 bash tests/on_gpu.sh                   # the same at tiny sizes on a CPU, two minutes
#
# Nothing stops at a failure: the file says what each command returned. What there is no time left
# for is skipped, and the file says that too.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} TINY=${TINY:-} PORT=${PORT:-} STORIES=${STORIES:-} MINUTES=${MINUTES:-20}
OUT=${OUT:-out/on_gpu} END=$((SECONDS + 60 * 24))
export HF_HUB_OFFLINE=1
rm -rf "$OUT"
mkdir -p "$OUT"

run() {     # run NAME SECONDS COMMAND...: within the seconds; its output to NAME.log, a line to steps
    local name=$1 limit=$2 began=$SECONDS rc=skipped
    shift 2
    ((limit > END - SECONDS)) && limit=$((END - SECONDS))
    if ((limit > 5)); then
        echo "== $name: $*"
        timeout --kill-after=20 "$limit" "$@" >"$OUT/$name.log" 2>&1
        rc=$?
        tail -n 3 "$OUT/$name.log" | cut -c1-200
    fi
    printf '%s\t%s\t%s\t%s\n' "$name" "$rc" $((SECONDS - began)) "$*" >>"$OUT/steps"
}

# two ranks on one card: NCCL refuses that, gloo does not
cat >"$OUT/two_ranks.py" <<'PY'
import os, runpy, sys
import torch.distributed as dist
sys.path.insert(0, os.getcwd())
start = dist.init_process_group
dist.init_process_group = lambda backend, **more: start('gloo', **more)
os.environ['LOCAL_RANK'] = '0'
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
PY
# an ELF-B that is none, for TINY
cat >"$OUT/tiny_bench.py" <<'PY'
import os, runpy, sys
sys.path.insert(0, os.getcwd())
import model
model.MODELS['ELF-B'] = model.ELFConfig(n_layer=1, n_embd=64, n_head=2, vocab_size=100)
sys.argv[0] = 'bench.py'
runpy.run_path('bench.py', run_name='__main__')
PY

train() {   # train NAME ITERATIONS MORE...: config/gpu_debug.py
    local name=$1 iterations=$2
    shift 2
    if [[ $TINY ]]; then
        iterations=$((iterations / 250 + 2))
        set -- --device=cpu --compile=false --n_layer=1 --n_embd=64 --n_head=2 --batch_size=4 \
            --eval_iters=5 --log_interval=1 "$@"
    fi
    run "$name" 400 "${LAUNCH[@]}" train.py config/gpu_debug.py --data_dir="$OUT/data" \
        --out_dir="$OUT/$name" --max_iters=$iterations "$@"
}

bench() {   # bench NAME SECONDS MORE...
    local name=$1 limit=$2
    shift 2
    if [[ $TINY ]]; then
        run "$name" "$limit" "$PYTHON" "$OUT/tiny_bench.py" "$@" --device=cpu --runs=1 \
            --compile=false --batch_size=4 --max_length=16 --sample_batch_size=1 --sample_length=16
    else
        run "$name" "$limit" "$PYTHON" bench.py "$@" --ns_dtype=bfloat16 --max_length=1024 \
            --sample_batch_size=64 --sample_length=1024
    fi
}

LAUNCH=("$PYTHON")
bench B_compiled 420 --size=ELF-B --batch_size=64 --compile=true --profile=true
run tests 240 "$PYTHON" -m pytest -q tests/test_gpu.py -k "${TINY:+of_the_cpu or wrong_device}"
run text 60 "$PYTHON" tests/pydocs.py "$OUT/pydocs.txt"
run prepare 120 "$PYTHON" prepare.py --dataset="$OUT/pydocs.txt" --name=pydocs128 \
    --max_length=128 --letters_only=false --encoder_dim=128 --data_dir="$OUT/data"
train debug 1000
cp -r "$OUT/debug" "$OUT/resumed"
train resumed 1500 --init_from=resume
train checkpointing 100 --gradient_checkpointing=true
train bfloat16 300 --dtype=bfloat16
train float32 300 --dtype=float32
train one_rank 50 --dtype=float32 --compile=false
LAUNCH=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=2 "$OUT/two_ranks.py")
train two_ranks 50 --dtype=float32 --compile=false
bench B_eager 120 --size=ELF-B --batch_size=64 --profile=true
if [[ $PORT ]]; then
    for what in train sample; do
        run "port_$what" 240 "$PYTHON" tests/vs_port.py --port="$PORT" --what=$what --device=cuda \
            --batch_size=16 --max_length=1024 --compile=true --ours=bfloat16/bfloat16
    done
fi
if [[ ! $TINY ]]; then
    bench M_eager 120 --size=ELF-M --batch_size=32
    bench L_eager 120 --size=ELF-L --batch_size=16
    bench M_compiled 360 --size=ELF-M --batch_size=32 --compile=true
    bench L_compiled 360 --size=ELF-L --batch_size=16 --compile=true
fi
if [[ $STORIES ]]; then
    END=$((SECONDS + 60 * (MINUTES + 15)))
    run stories_prepare 600 "$PYTHON" prepare.py --dataset="$STORIES" --name=stories \
        --token_level=subwords --letters_only=false --encoder_dim=128 --data_dir="$OUT/data"
    run stories $((60 * MINUTES + 120)) "$PYTHON" train.py config/tinystories.py --encoder= \
        --tokenizer= --data_dir="$OUT/data" --dataset=stories --out_dir="$OUT/stories" \
        --noise_scale=1.0 --decoder_noise_scale=2.5 --max_minutes="$MINUTES"
    run stories_eval 300 "$PYTHON" eval.py --out_dir="$OUT/stories" --data_dir="$OUT/data" \
        --dataset=stories --judge=ngram --num_samples=200
fi

"$PYTHON" - "$OUT" <<'PY'
import json, os, subprocess, sys
import torch

def output_of(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ''

def lines_of(*path):
    try:
        with open(os.path.join(*path), encoding='utf-8', errors='replace') as f:
            return [line for line in f.read().splitlines() if line.strip()]
    except OSError:
        return []

out, steps = sys.argv[1], []
for line in lines_of(out, 'steps'):
    name, rc, seconds, command = line.split('\t')
    step = dict(name=name, rc=rc, seconds=int(seconds), command=command)
    log = lines_of(out, name + '.log')
    try:
        step['report'] = json.loads(log[-1])
    except (IndexError, ValueError):
        step['log'] = log[-25:]
    # a run's curve, and what it wrote
    curve = [json.loads(row) for row in lines_of(out, name, 'metrics.jsonl')]
    if curve:
        step['curve'] = curve[:30] + curve[30:-1:5] + curve[-1:]
    folder = os.path.join(out, name)
    for file in sorted(os.listdir(folder) if os.path.isdir(folder) else []):
        if file.startswith('samples'):
            step[file] = lines_of(folder, file)[:2]
    steps.append(step)
cuda = torch.cuda.is_available()
report = dict(
    card=torch.cuda.get_device_name() if cuda else None,
    driver=output_of('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'),
    torch=torch.__version__, cuda=torch.version.cuda,
    commit=output_of('git', 'rev-parse', 'HEAD'), date=output_of('date', '-u', '+%F %T'),
    seconds=sum(step['seconds'] for step in steps), steps=steps)
with open(os.path.join(out, 'on_gpu.json'), 'w', encoding='utf-8') as f:
    json.dump(report, f, indent=1)
bad = [f"{step['name']} ({step['rc']})" for step in steps if step['rc'] != '0']
print(f"{len(steps)} commands, {report['seconds']} s, not done: {', '.join(bad) or 'none'}")
print(os.path.join(out, 'on_gpu.json'))
sys.exit(bool(bad))
PY
