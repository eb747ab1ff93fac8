import time, pytest, torch

P = {"epsilon": 8.0, "clip_norm": 1.0}
from cotune.client.training import train_round


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("prec", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["head", "lora", "full"])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "llama", "qwen2"])
def test_x(make_plan, make_site, state_for, kind, mode, prec):
    lora = {"rank": 2, "targets": ["q_lin"]} if kind == "distilbert" else {"rank": 2}
    plan = make_plan(kind, train=mode, privacy=P, lora=lora, model={"precision": prec})
    s = make_site()
    st = state_for(plan)
    t = time.time()
    try:
        u = train_round(plan, s, 1, st)
        print("RES", kind, mode, prec, u.steps, u.epsilon, round(time.time() - t, 2))
    except Exception as e:
        print("RES", kind, mode, prec, type(e).__name__, str(e)[:300].replace("\n", " "), round(time.time() - t, 2))
