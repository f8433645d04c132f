"""Time and memory of rsd.py: python .ci/bench.py [--peer PYTHON SCRIPT MODELS] [--pairs 5]

Each case runs in a fresh process on one thread and prints one JSON line. --peer names another
trainer to measure in turn: the python of its environment, its script, which prints one JSON line,
and the directory of its models `tiny` and `wide-vocab`. Where there is a GPU, the steps of models
of 1.5B and 8B parameters (LoRA) are timed instead, beside what the GPU can do at most and, where
TRL is installed, beside two of its trainers.
"""
import argparse
import contextlib
import functools
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen2Config

import rsd

SHAPES = {
    "quick": dict(
        vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64,
    ),
    "tiny": dict(
        vocab_size=4096, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=1024,
    ),
    "wide-vocab": dict(
        vocab_size=151936, hidden_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, intermediate_size=2048,
    ),
    "1.5B": dict(
        vocab_size=151936, hidden_size=1536, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, intermediate_size=8960,
    ),
    "8B": dict(
        vocab_size=151936, hidden_size=4096, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, intermediate_size=12288, tie_word_embeddings=False,
    ),
}
ON_GPU = torch.cuda.is_available()


# ---- what is measured with -----------------------------------------------------------------------


def peak_mib():
    """High-water mark of this process's memory."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def forget_peak():
    """Set the high-water mark to the memory in use."""
    Path("/proc/self/clear_refs").write_text("5")


def clock():
    """Wall and CPU seconds, once a GPU has done its work."""
    if ON_GPU:
        torch.cuda.synchronize()
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def random_model(shape, lora=0):
    """A model with random weights, whose stop token is no token of its vocabulary."""
    torch.manual_seed(0)
    sizes = {"tie_word_embeddings": True} | SHAPES[shape]
    config = Qwen2Config(
        **sizes, max_position_embeddings=32768, eos_token_id=None, bos_token_id=None
    )
    dtype = torch.bfloat16 if lora and ON_GPU else torch.float32
    with torch.device("cuda" if ON_GPU else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


# ---- cases ---------------------------------------------------------------------------------------


def bench_step(
    shape, prompts=8, tokens=128, lora=0, warmup=1, steps=2, context=322, sampled=True,
    checkpointing=False, compiled=False, budget=16384 if ON_GPU else 2048,
):
    """Seconds of one train_step with its split, and peak memory. On a CPU also its parts, each
    timed alone, and their sum; on a GPU what of its speed is used. sampled=False: the completions
    are random tokens, since a long sampling says nothing new. compiled: the sampler, as `train
    --compile on` has it; the seconds of the first step, which compiles, are reported apart."""
    model = random_model(shape, lora)
    if lora:
        rsd.add_lora(model, lora)
    teacher = rsd.make_teacher(model, "fixed")
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    vocabulary = model.config.vocab_size
    sampling = {"max_new_tokens": tokens, "batch_size": prompts}
    sample = functools.partial(rsd.sample_completions, model, stop={vocabulary}, **sampling)
    if compiled:
        twin = rsd.make_teacher(model, "fixed")
        sample = functools.partial(
            rsd.sample_compiled, model, twin, stop={vocabulary}, **sampling
        )
    chunk = 192_000_000 if ON_GPU else 24_000_000
    rng = random.Random(0)

    def write(examples):
        return rsd.model_writes(sample, examples)

    def random_ids(n):
        return [rng.randrange(4, vocabulary) for _ in range(n)]

    def write_at_random(examples):
        return [replace(e, completion_ids=random_ids(tokens)) for e in examples]

    names = ("s_sampling", "s_rescoring", "s_update")
    times = []
    for _ in range(warmup + steps):
        examples = [rsd.Episode({}, random_ids(64), random_ids(context)) for _ in range(prompts)]
        start = clock()
        episodes, figures = rsd.train_step(
            model, teacher, examples, write if sampled else write_at_random, rsd.token_loss,
            optimizer, 1e-5, budget, chunk=chunk,
        )
        times.append([*(clock() - start).tolist(), *(figures[name] for name in names)])
        assert {len(e.completion_ids) for e in episodes} == {tokens}

    wall, cpu, *split = torch.tensor(times[warmup:]).median(0).values.tolist()
    result = {"s": wall, "cpu_s": cpu, **dict(zip(names, split))}
    result["s_without_sampling"] = wall - result["s_sampling"]
    result["first_step_s"] = times[0][0]
    result["tokens_per_s"] = prompts * tokens / wall
    result["peak_mib"] = peak_mib()
    if ON_GPU:
        result["cuda_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        result |= shares_of_gpu(model, prompts, tokens, context, result)
    else:
        parts = parts_alone(model, teacher, episodes)
        result |= {"sum_of_parts_s": sum(parts), "parts_s": parts}
    return result


def gpu_ceilings():
    """What this GPU does at most: bf16 matrix products (operations a second, 8,192 wide, random
    entries) and copies (bytes a second, read and written)."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(2**31, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)

    def seconds(work, n=20):
        for _ in range(3):
            work()
        start = clock()
        for _ in range(n):
            work()
        return (clock() - start)[0].item() / n

    return 2 * 8192**3 / seconds(lambda: a @ b), 2 * 2**31 / seconds(lambda: target.copy_(source))


def shares_of_gpu(model, prompts, tokens, context, seconds):
    """Matrix products that the update and the re-scoring need, over those that the GPU can do in
    their time; and the time in which it can read the weights once a token, over that of sampling.
    Not counted: attention, checkpointing's second forward pass, adapters."""
    matrix_rate, copy_rate = gpu_ceilings()
    head = model.get_output_embeddings().weight
    layers = [
        module.weight
        for name, module in model.base_model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name
    ]
    body = sum(w.numel() for w in layers)
    n = prompts * tokens
    teacher = 2 * body * prompts * (context + tokens)
    # forward, gradient of the inputs, and where it is trained, of the weight
    student = 2 * body * prompts * (64 + tokens) * (2 + layers[0].requires_grad)
    heads = 2 * head.numel() * n * (2 + head.requires_grad) + 2 * head.numel() * n
    read = 2 * (body + head.numel()) * tokens / copy_rate
    return {
        "matrix_tflops": matrix_rate / 1e12,
        "copy_tb_per_s": copy_rate / 1e12,
        "update_share": (student + heads) / seconds["s_update"] / matrix_rate,
        "rescoring_share": teacher / seconds["s_rescoring"] / matrix_rate,
        "sampling_share": read / max(seconds["s_sampling"], 1e-9),
    }


def bench_trl(trainer, shape, prompts=32, tokens=256, context=322, rows=8, warmup=1, steps=2):
    """A step of TRL's DistillationTrainer (its teacher sees the student's prompt) or SDFTTrainer (a
    longer one), with the same model, frozen bf16 teacher, forward KL and optimizer; `rows` of the
    step's completions at a time."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    student = random_model(shape)
    teacher = rsd.make_teacher(student, "fixed")
    tokenizer = AutoTokenizer.from_pretrained(f"{rsd.TOY}/base-0", padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = {"prompt": ["0" * 64] * prompts * (warmup + steps)}
    assert len(tokenizer("0" * 64)["input_ids"]) == 64
    folder = tempfile.TemporaryDirectory()
    config = dict(
        output_dir=folder.name, max_steps=warmup + steps, learning_rate=1e-5, bf16=ON_GPU,
        use_cpu=not ON_GPU,
        per_device_train_batch_size=rows, gradient_accumulation_steps=prompts // rows,
        gradient_checkpointing=False, max_completion_length=tokens, weight_decay=0.0,
        generation_kwargs={"min_new_tokens": tokens}, report_to="none", save_strategy="no",
        disable_tqdm=True, optim="adamw_torch_fused", lr_scheduler_type="constant",
    )
    if trainer == "DistillationTrainer":
        from trl import DistillationConfig, DistillationTrainer

        made = DistillationTrainer(
            student, teacher, args=DistillationConfig(**config, beta=0.0),
            train_dataset=Dataset.from_dict(data), processing_class=tokenizer,
        )
    else:
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer

        data["privileged_context"] = ["0" * (context - 64)] * len(data["prompt"])
        options = dict(
            num_generations=1, distillation_mode="full_logits", distillation_alpha=0.0,
            teacher_model_kind="base", teacher_prompt_template="{prompt}{privileged_context}",
            model_init_kwargs={"dtype": "float32"},
        )
        teacher.save_pretrained(folder.name)  # it loads its teacher from where its student lies
        del student, teacher
        made = SDFTTrainer(
            folder.name, args=SDFTConfig(**config, **options),
            train_dataset=Dataset.from_dict(data), processing_class=tokenizer,
        )
    walls, sampling, lengths = [], [], []
    generate = made._generate

    def timed_generate(*words, **options):
        start = clock()
        found = generate(*words, **options)
        sampling.append((clock() - start)[0].item())
        lengths.extend(len(ids) for ids in found[1])
        return found

    class Steps(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = clock()

        def on_step_end(self, *_, **__):
            walls.append((clock() - self.start)[0].item())

    made._generate = timed_generate
    made.add_callback(Steps())
    with contextlib.redirect_stdout(sys.stderr):
        made.train()
    measured = torch.tensor([walls[warmup:], sampling[warmup:]])
    without = (measured[0] - measured[1]).median().item()
    wall, sampling_seconds = measured.median(1).values.tolist()
    return {
        "s": wall, "s_sampling": sampling_seconds, "s_without_sampling": without,
        "completions": len(lengths), "lengths": sorted(set(lengths)),
        "cuda_peak_mib": torch.cuda.max_memory_allocated() / 2**20,
    }


def parts_alone(model, teacher, episodes):
    """Seconds of a step's parts by torch and transformers alone: generate; the teacher's forward;
    the student's forward and backward. Heads run on the completion only."""
    n = len(episodes[0].completion_ids)
    times = [clock()]
    prompts = torch.tensor([e.prompt_ids for e in episodes])
    model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n, min_new_tokens=n,
        do_sample=True, top_k=0, pad_token_id=0,
    )
    times.append(clock())

    batch = torch.tensor([e.teacher_ids + e.completion_ids[:-1] for e in episodes])
    with torch.no_grad():
        teacher(batch, logits_to_keep=n, use_cache=False)
    times.append(clock())

    batch = torch.tensor([e.prompt_ids + e.completion_ids[:-1] for e in episodes])
    logits = model(batch, logits_to_keep=n, use_cache=False).logits
    logits.backward(torch.full_like(logits, 1e-6))
    times.append(clock())
    return [(after - before)[0].item() for before, after in zip(times, times[1:])]


def bench_loss(kind, tokens, frozen, vocabulary=151936, width=1536):
    """The loss from given hidden states: "ours", "bare" matrix products, or "plain" full logits.
    frozen: the head's weight is not trained."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=0, tie_word_embeddings=True
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    teacher.requires_grad_(False)
    weight = model.lm_head.weight.requires_grad_(not frozen)
    hidden = torch.randn(tokens, width, requires_grad=True) * 1.0
    teacher_hidden = torch.randn(tokens, width)
    per_token = torch.zeros(tokens, dtype=torch.long), torch.ones(tokens)

    forget_peak()
    before, start = peak_mib(), clock()
    if kind == "ours":
        rsd.backward_in_chunks(
            rsd.token_loss, model, hidden, teacher, teacher_hidden, per_token, tokens
        )
    elif kind == "plain":
        target = F.linear(teacher_hidden, teacher.lm_head.weight).log_softmax(-1)
        logp = F.linear(hidden, weight).log_softmax(-1)
        kl = F.kl_div(logp, target, log_target=True, reduction="sum")
        (kl / tokens).backward()
    else:
        with torch.no_grad():
            F.linear(teacher_hidden, teacher.lm_head.weight)
            logits = F.linear(hidden, weight)
            made = [logits @ weight]
            if not frozen:
                made.append(logits.T @ hidden)
    wall, cpu = (clock() - start).tolist()
    return {"s": wall, "cpu_s": cpu, "peak_over_start_mib": peak_mib() - before}


def bench_sampler(shape="tiny", prompts=64, tokens=64, compiled=False):
    """Tokens per second of sampling with prompts of 64 tokens; compiled: after a first call."""
    model = random_model(shape)
    stop = {model.config.vocab_size}
    ids = torch.randint(4, model.config.vocab_size, (prompts, 64)).tolist()
    sample = functools.partial(
        rsd.sample_completions, model, stop=stop, max_new_tokens=tokens, batch_size=prompts
    )
    result = {}
    if compiled:
        twin = rsd.make_teacher(model, "fixed")
        sample = functools.partial(
            rsd.sample_compiled, model, twin, stop=stop, max_new_tokens=tokens, batch_size=prompts
        )
        start = clock()
        sample(ids)
        result["first_call_s"] = (clock() - start)[0].item()
    start = clock()
    sample(ids)
    return result | {"tokens_per_s": prompts * tokens / (clock() - start)[0].item()}


def bench_parse():
    """Seconds of parse_rubric for 1,000 texts of five criteria, every other cut off."""
    description = "Uses \\\\frac{a}{b} " * 8
    rubric = [{"title": f"Law {i}", "description": description, "weight": 5} for i in range(5)]
    text = json.dumps(rubric)
    cut_off = text[:-9]
    start = clock()
    lengths = [len(rsd.parse_rubric(t)[0]) for t in [text, cut_off] * 500]
    seconds = (clock() - start)[0].item()
    assert lengths == [5, 4] * 500
    return {"s": seconds}


CASES = {
    "step": bench_step,
    "trl": bench_trl,
    "loss": bench_loss,
    "sampler": bench_sampler,
    "parse": bench_parse,
}


# ---- running them --------------------------------------------------------------------------------


def show(line):
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}
    print(json.dumps(rounded), flush=True)


def last_line(words, **options):
    """Run a command -> the JSON object of its last line."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def fresh(case, **options):
    """One case in a fresh process -> its figures, shown."""
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    words = [sys.executable, __file__, "--case", case, json.dumps(options)]
    figures = last_line(words, env=environment)
    show({"case": case} | options | figures)
    return figures


def run_peer(python, script, models, shape, steps):
    """The peer's step, in the names of ours."""
    words = [python, script, "--model", f"{models}/{shape}", "--steps", steps, "--warmup", 1]
    found = last_line(words)
    split = found["split_wall_median_s"]
    figures = {
        "s": found["sec_per_step_median"],
        "cpu_s": found["cpu_sec_per_step_median"],
        "s_without_sampling": found["sec_per_step_median"] - split["generation"],
        "peak_mib": found["peak_rss_mib"],
        "split": split,
    }
    show({"peer": shape} | figures)
    return figures


def show_ratios(name, pairs, keys):
    """Median and range of ours / theirs, figure by figure."""
    for key in keys:
        ratios = sorted(ours[key] / theirs[key] for ours, theirs in pairs)
        show({
            "ratio": f"{name}, {key}",
            "median": ratios[len(ratios) // 2],
            "range": [round(ratios[0], 3), round(ratios[-1], 3)],
            "pairs": len(ratios),
        })


def on_gpu(quick):
    """Steps of large models; long completions are not sampled."""
    if quick:
        fresh("step", shape="quick", prompts=2, tokens=8, steps=1)
        return
    step = {"shape": "1.5B", "prompts": 32, "tokens": 512}
    fresh("step", **step)
    fresh("step", **step, compiled=True, steps=4)
    for prompts, tokens in ((32, 512), (128, 512), (32, 2048)):
        fresh("sampler", shape="1.5B", prompts=prompts, tokens=tokens, compiled=True)
    large = {"shape": "8B", "prompts": 32, "lora": 64, "checkpointing": True, "warmup": 2}
    fresh("step", **large, tokens=512, compiled=True)
    fresh("step", **large, tokens=2048, sampled=False)
    if importlib.util.find_spec("trl"):
        ours = fresh("step", shape="1.5B", prompts=32, tokens=256, context=64, compiled=True)
        keys = ("s", "s_without_sampling", "cuda_peak_mib")
        theirs = fresh("trl", trainer="DistillationTrainer", shape="1.5B")
        show_ratios("step 1.5B, ours / DistillationTrainer", [(ours, theirs)], keys)
        ours = fresh("step", shape="1.5B", prompts=32, tokens=256, compiled=True)
        theirs = fresh("trl", trainer="SDFTTrainer", shape="1.5B")
        show_ratios("step 1.5B, ours / SDFTTrainer", [(ours, theirs)], keys)


def on_cpu(pairs, peer, quick):
    """The loss alone, then whole steps, each in turn with what it is compared with."""
    size = {"vocabulary": 500, "width": 32} if quick else {}
    fresh("loss", kind="ours", tokens=1024, frozen=False, **size)
    fresh("loss", kind="ours", tokens=1024, frozen=True, **size)
    fresh("loss", kind="ours", tokens=4096, frozen=True, **size)
    fresh("loss", kind="plain", tokens=1024, frozen=True, **size)  # with 4,096 it takes 20 GB
    found = []
    for _ in range(pairs):
        ours = fresh("loss", kind="ours", tokens=1024, frozen=False, **size)
        bare = fresh("loss", kind="bare", tokens=1024, frozen=False, **size)
        found.append((ours, bare))
    keys = ("s", "cpu_s") if quick else ("s", "cpu_s", "peak_over_start_mib")
    show_ratios("loss, ours / bare products", found, keys)

    if quick:
        fresh("step", shape="quick", steps=1, compiled=True)
    steps_of = {"quick": 1} if quick else {"tiny": 4, "wide-vocab": 1}
    for shape, steps in steps_of.items():
        found = []
        for _ in range(pairs):
            ours = fresh("step", shape=shape, steps=steps)
            if peer:
                found.append((ours, run_peer(*peer, shape, steps)))
        if found:
            keys = ("s", "cpu_s", "s_without_sampling", "peak_mib")
            show_ratios(f"step {shape}, ours / peer", found, keys)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = ("PYTHON", "SCRIPT", "MODELS")
    parser.add_argument("--peer", nargs=3, metavar=names, help="Another trainer, measured in turn.")
    parser.add_argument("--pairs", type=int, default=5, help="Pairs of runs of each comparison.")
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)  # do the cases run?
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)  # one of them, in this process
    args = parser.parse_args()
    if args.case:
        name, options = args.case
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        print(json.dumps(CASES[name](**json.loads(options))))
        return
    fresh("parse")
    fresh("sampler", shape="quick" if args.quick else "tiny")
    if ON_GPU:
        on_gpu(args.quick)
    else:
        on_cpu(args.pairs, args.peer, args.quick)


if __name__ == "__main__":
    main()
