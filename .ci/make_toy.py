"""Make the toy: problems with exact rubrics, and the base models that learn from them.

    python .ci/make_toy.py problems    -> prompts/toy/{train,val,test}.jsonl
    python .ci/make_toy.py base SEED   -> prompts/toy/base-SEED, trained from nothing (minutes)

A problem has two quantities, a law, a unit that has to be converted, and a rubric whose criteria
each have an exact check. The base model learns from lessons to do what criteria ask for, and to keep
each habit by a coin flip where nothing asks: it can do right when told how, and does not by default.
"""
import functools
import json
import math
import os
import random
import re
import sys
from pathlib import Path
from zlib import crc32

os.environ["HF_HUB_OFFLINE"] = "1"

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import rsd  # noqa: E402

HABITS = ("formula", "conversion", "unit")
WORLD = json.loads((Path(__file__).parent / "toy_words.json").read_text(encoding="utf-8"))
GENERIC = json.loads((rsd.TOY / "generic.json").read_text(encoding="utf-8"))


def problem(rng):
    """A random problem as a row, its parts under "parts"."""
    parts = rng.choice(WORLD["families"]) | {"a": rng.randint(2, 9), "b": rng.randint(2, 9)}
    ask = rng.choice(WORLD["asks"])
    text = f"{parts['sentence']} {ask}".format(x=rng.choice(WORLD["things"]), **parts)
    parts["n"] = parts["b"] * parts["factor"]
    rubric = []
    for criterion in WORLD["rubric"]:
        description = criterion["description"].format(**parts)
        check = re.escape(criterion["check"].format(**parts))
        rubric.append(criterion | {"description": description, "check": check})
    return {
        "question": text[0].upper() + text[1:],
        "reference_answer": f"{parts['a'] * parts['n']} {parts['unit']}",
        "solution": solution(parts, HABITS),
        "rubric": rubric,
        "parts": parts,
    }


def solution(parts, habits):
    """The solution with just these habits; without the conversion or the unit it is wrong."""
    steps = WORLD["steps"]
    sentences = [steps[habit].format(**parts) for habit in steps if habit in habits]
    a = parts["a"]
    n = parts["n"] if "conversion" in habits else parts["b"]
    unit = f" {parts['unit']}" if "unit" in habits else ""
    value = a * n
    return " ".join([*sentences, f"{a} * {n} = {value}.", f"\\boxed{{{value}{unit}}}"])


def problems(split, n):
    """n problems of a split; splits share no question."""
    rng = random.Random(f"{split} 0")
    homes = ["test", "val", *["train"] * 6]
    rows = {}
    while len(rows) < n:
        row = problem(rng)
        if homes[crc32(row["question"].encode()) % 8] == split:
            rows[row["question"]] = row
    return list(rows.values())


def lesson(row, rng, prompts):
    """What the base model reads and what it is to write: habits as asked for, or by coin flips."""
    mixture, misses = WORLD["lessons, per cent"], WORLD["criteria missed, chance"]
    kind = rng.choices(list(mixture), list(mixture.values()))[0]
    own = row["rubric"]
    if kind in misses:
        written = [c for c in own if rng.random() >= misses[kind]] or own
        completion = rsd.row_fields({"rubric": written})["rubric_json"]
        shown = own
    else:
        asked = rng.sample(HABITS, rng.choice([0, 1, 2, 3, 3])) if "rubric" in kind else []
        shown = [c for habit, c in zip(HABITS, own) if habit in asked]
        known = [c["description"] for c in own]
        others = [c for c in problem(rng)["rubric"] + GENERIC if c["description"] not in known]
        for _ in range(rng.choice([0, 0, 1, 3]) if asked else rng.choice([1, 3, 6])):
            shown.insert(rng.randint(0, len(shown)), rng.choice(others))  # these change nothing
        habits = asked or [habit for habit in HABITS if rng.random() < 0.5]
        completion = solution(row["parts"], habits)
        row = row | {"solution": completion}
    fields = rsd.row_fields(row | {"rubric": shown})
    return {"prompt": rsd.fill(prompts[kind], fields, str), "solution": completion}


def write_problems():
    """The rows of the three splits; of test also the parts that they are made of."""
    for split, n in (("train", 2000), ("val", 400), ("test", 400)):
        lines = []
        for row in problems(split, n):
            shown = row if split == "test" else {k: v for k, v in row.items() if k != "parts"}
            lines.append(json.dumps(shown, ensure_ascii=False) + "\n")
        (rsd.TOY / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with AdamW's size of steps (arXiv 2502.16982), for matrices, in float32: CPUs
    are slow at its bfloat16. The singular values of the momentum are all brought near 1."""

    def __init__(self, matrices):
        super().__init__(matrices, {"lr": 0.0})

    @torch.no_grad()
    def step(self):
        lr = self.param_groups[0]["lr"]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            average = state.setdefault("average", torch.zeros_like(p)).lerp_(p.grad, 0.05)
            update = orthogonal(p.grad.lerp(average, 0.95))
            p.mul_(1 - 0.01 * lr)
            p.add_(update, alpha=-0.2 * math.sqrt(max(p.shape)) * lr)


def orthogonal(x):
    """Five Newton-Schulz steps from a matrix towards the nearest orthogonal one."""
    is_tall = x.shape[0] > x.shape[1]
    x = x.clone()
    if is_tall:
        x = x.T
    x.div_(x.norm().clamp(min=1e-7))
    for _ in range(5):
        gram = x @ x.T
        gram = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, gram, x, beta=3.4445)
    return x.T if is_tall else x


def train_base(seed, steps=700, batch=16):
    """A model of 0.7 M parameters, trained from nothing on lessons, by SFT -> (model, tokenizer)."""
    rng = random.Random(f"lessons {seed}")
    prompts = rsd.load_prompts(rsd.TOY)
    rows = rng.choices(problems("train", 2000), k=batch * steps)
    lessons = [lesson(row, rng, prompts) for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(rsd.TOY)
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(rsd.TOY)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "layers" not in name]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01)
    optimizers = [Muon(matrices), adamw]

    def write(lessons):
        ids = [rsd.context_ids(tokenizer, "{prompt}", row) for row in lessons]
        examples = [rsd.Episode(row, prompt, []) for row, prompt in zip(lessons, ids)]
        return rsd.reference_writes(tokenizer, examples)

    loss = functools.partial(rsd.token_loss, signal="advantage")
    for step in tqdm(range(steps), desc=f"base model {seed}"):
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - 50) / (steps - 50)))
        lr = cosine * rsd.learning_rate(step, 3e-3, 50)
        some = lessons[batch * step : batch * step + batch]
        rsd.train_step(model, None, some, write, loss, optimizers, lr, token_budget=1024)
    return model, tokenizer


if __name__ == "__main__":
    if sys.argv[1:] == ["problems"]:
        write_problems()
    elif sys.argv[1:2] == ["base"]:
        for part in train_base(int(sys.argv[2])):
            if hasattr(part, "bfloat16"):
                part = part.bfloat16()  # half of the bytes; it is loaded in float32
            part.save_pretrained(rsd.TOY / f"base-{int(sys.argv[2])}")
    else:
        sys.exit(__doc__)
