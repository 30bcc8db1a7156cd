#!/usr/bin/env bash
# A published 0.5B model, fine-tuned and then trained by step-wise RL, on two CPU cores; see docs/real-run.md.
#
#     bash docs/real-run.sh [FOLDER]                      # default: runs/real
#     timeout -s INT 140m bash docs/real-run.sh           # a piece of it; the same command goes on from there
#
# Every part goes on where it was stopped, by Ctrl-C or kill -9, and is skipped where it is done.
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-runs/real}
model=${MODEL:-Qwen/Qwen2.5-Coder-0.5B-Instruct}
raw=${RAW:-}                        # a folder that holds folders of publishers' files, by task; empty: miniatures alone
held_in=${HELD_IN:-held-in}         # tasks to train on, or one of them
held_out=${HELD_OUT:-held-out}      # tasks that are measured alone, or one of them
states=${STATES:-4}                 # recorded states of a task
samples=${SAMPLES:-8}               # actions in each
trajectories=${TRAJECTORIES:-2}     # whole ones of a task and an agent
steps=${STEPS:-9}                   # replies of one
iterations=${ITERATIONS:-40}        # of RL
read -ra sft_flags <<<"${SFT_FLAGS:-}"
read -ra rl_flags <<<"${RL_FLAGS:-}"
agent=(--prompt-format medium --fields "Thought,Action,Action Input" --context 1280 --max-new-tokens 160 --steps "$steps"
       --actions "Set Constant,Replace In Script,Undo Edit Script,Execute Script,Final Answer" --coder none)
if [ -n "$raw" ] && [ ! -d "$raw" ]; then echo "RAW: there is no folder $raw" >&2; exit 2; fi
mkdir -p "$run"
# The tasks of a split, and the data that its states are of.
declare -A tasks=([held-in]=$held_in [held-out]=$held_out)
declare -A data=([held-in]=$run/miniatures [held-out]=$run/data)
part() { printf '\n==== %s  %s\n' "$(date +%H:%M:%S)" "$*" | tee -a "$run/parts.log"; }

# measure NAME MODEL SPLIT: the reward of single actions in the recorded states
measure() {
    part "states, $3: $1"
    python eval.py --states "$run/$3.jsonl" --task "${tasks[$3]}" --model "$2" --samples "$samples" --temperature 1 \
        --context 1280 --max-new-tokens 160 --data "${data[$3]}" --out "$run/eval/$1/$3"
}

# play NAME MODEL SPLIT: whole trajectories
play() {
    part "trajectories, $3: $1"
    python eval.py --task "${tasks[$3]}" --model "$2" "${agent[@]}" --trajectories "$trajectories" --temperature 1 \
        --data "$run/data" --out "$run/eval/$1/$3-trajectories"
}

part "0. how long each part takes on this machine, about"
if [ ! -f "$run/plan.txt" ]; then
    python docs/real_run.py plan "$model" "$states" "$samples" "$trajectories" "$iterations" >"$run/plan.part"
    mv "$run/plan.part" "$run/plan.txt"
fi
cat "$run/plan.txt"
python rl.py --plan --model 0.5b 2>/dev/null | tail -2

part "1. data, and the states that are measured"
for folder in "$raw"/*/; do
    id=$(basename "$folder")
    if [ -n "$raw" ] && [ -d "tasks/$id" ]; then python -m tasks prepare "$id" --raw "$folder" --data "$run/data"; fi
done
for split in held-out held-in; do
    if [ ! -f "$run/$split.jsonl" ]; then
        python eval.py --record-states "$states" --states "$run/$split.jsonl" --task "${tasks[$split]}" "${agent[@]}" \
            --data "${data[$split]}" --out "$run/recorded/$split"
    fi
done

part "2. gate: the base model in held-in states"
measure base "$model" held-in

part "3. fine-tuning on what the scripted expert does"
python sft.py --preset 0.5b --model "$model" --task "$held_in" --data "$run/data" --trajectories "$run/trajectories" \
    --steps "$steps" --out "$run/sft" "${sft_flags[@]}"
measure sft "$run/sft" held-in
[ "${GATE:-on}" = off ] || python docs/real_run.py gate "$run/eval/sft/held-in"

part "4. step-wise RL"
python rl.py --model "$run/sft" --task "$held_in" --data "$run/data" --trajectories "$run/trajectories" --out "$run/rl" \
    --iterations "$iterations" "${rl_flags[@]}"

part "5. evaluation: single actions first, which decide"
for work in measure play; do
    for split in held-out held-in; do
        $work sft "$run/sft" $split
        $work rl "$run/rl" $split
        $work random random-edits $split
        $work base "$model" $split
    done
done

part "6. the table and the report"
python docs/real_run.py compare "$run/eval" base random sft rl | tee "$run/table.txt"
folders=$(printf "$run/eval/%s-trajectories," base/held-out random/held-out sft/held-out rl/held-out)
python eval.py --compare "$folders$run/sft,$run/rl" --out "$run"
part "done: $run/table.txt and $run/compare.html"
