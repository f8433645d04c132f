"""Write the toy world: problems with exact rubrics, and the lessons of its base model.

    python .ci/make_toy.py        -> prompts/toy/{train,val,test}.jsonl, lessons.parquet

A problem has two quantities, a law, a unit that has to be converted, and a rubric whose criteria
each have an exact check. The base model learns from lessons to do what criteria ask for, and to keep
each habit by a coin flip where nothing asks: it can do right when told how, and does not by default.
"""
import json
import random
import re
import sys
from pathlib import Path
from zlib import crc32

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

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


def solution(parts, habits, slip=False):
    """The solution with just these habits; without the conversion, or with a slip, it is wrong."""
    steps = WORLD["steps"]
    sentences = [steps[habit].format(**parts) for habit in steps if habit in habits]
    a = parts["a"]
    n = parts["n"] if "conversion" in habits else parts["b"]
    unit = f" {parts['unit']}" if "unit" in habits else ""
    value = (a + 1) * n if slip else a * n
    return " ".join([*sentences, f"{a} * {n} = {value}.", f"\\boxed{{{value}{unit}}}"])


def problems(split, n):
    """n problems of a split; splits share no question. noisy_solution: in half of the rows it leaves
    out a habit or makes a slip."""
    rng = random.Random(f"{split} 0")
    homes = ["test", "val", *["train"] * 6]
    rows = {}
    while len(rows) < n:
        row = problem(rng)
        if homes[crc32(row["question"].encode()) % 8] == split:
            rows[row["question"]] = row
    for row in rows.values():
        fault = rng.choice([*HABITS, "slip", None, None, None, None])
        row["noisy_solution"] = solution(row["parts"], {*HABITS} - {fault}, slip=fault == "slip")
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


def main():
    from datasets import Dataset

    rng = random.Random("lessons")
    prompts = rsd.load_prompts(rsd.TOY)
    for split, n in (("train", 2000), ("val", 400), ("test", 400)):
        rows = problems(split, n)
        lines = []
        for row in rows:
            shown = row if split == "test" else {k: v for k, v in row.items() if k != "parts"}
            lines.append(json.dumps(shown, ensure_ascii=False) + "\n")
        (rsd.TOY / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        if split == "train":
            lessons = [lesson(row, rng, prompts) for row in rng.choices(rows, k=11_200)]
            Dataset.from_list(lessons).to_parquet(str(rsd.TOY / "lessons.parquet"))


if __name__ == "__main__":
    main()
