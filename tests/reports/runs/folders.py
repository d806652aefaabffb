"""Run folders, as training leaves them, in small."""

import json

RANKER, BASELINE = "generative", "popularity"
SELECTION = f"{RANKER}/valid/all/ndcg@10"


def write_run(folder, *, scale=1.0, finished=True, script="train_decoder", learning_rate=0.001, **changes):
    """A run of 100 steps, logged every 10 and evaluated every 20; changes are those of its loop settings.

    Metrics of the model are `scale` times 0.1 at the end; the best evaluation is the one at step 80.
    """
    folder.mkdir(parents=True, exist_ok=True)
    loop = {"num_steps": 100, "learning_rate": learning_rate, "patience": None, "max_minutes": None} | changes
    settings = [
        f"{script}.train.save_dir_root = '{folder.name}'  # run.gin:1",
        f"{script}.train.loop = @decoder/LoopConfig()  # run.gin:2",
        *(
            f"decoder/LoopConfig.{name} = {value!r}  # run.gin:{line}"
            for line, (name, value) in enumerate(loop.items(), 3)
        ),
        "train_decoder.train.tokenizer = 'a  # b'  # command line",
        "# RetrievalModelConfig.languages = <factory>  # default",
    ]
    (folder / "operative_config.gin").write_text("\n".join(settings) + "\n")
    environment = {
        "selection_metric": SELECTION,
        "higher_is_better": True,
        "run_format": 1,
        "started": "2026-01-02T03:04:05+00:00",
        "command": "python train_decoder.py run.gin",
        "seed": 7,
        "data_manifest_hash": "52fed9f1265f5b6d",
        "commit": "c092401683c3",
        "hardware": {"cpu": "Some CPU", "cpu_count": 2, "cuda_devices": ["Some GPU"], "num_processes": 1},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    }
    write_json(folder / "env.json", environment)
    write_log(folder, log_records(scale))
    progress = {"step": 100, "evaluated_step": 100, "best_metric": 0.1 * scale, "best_step": 80, "seconds": 65.0}
    write_json(folder / "checkpoints/step_00000100/progress.json", progress | {"evaluations_without_improvement": 1})
    if finished:
        write_json(folder / "metrics.json", final_metrics(scale) | {"best_step": 80, "steps": 100, "seconds": 65.2})
    return folder


def log_records(scale):
    records = []
    for step in range(10, 101, 10):
        train = {"train/loss": 10.0 / step, "train/learning_rate": 0.001, "train/gradient_norm": 1.0}
        records.append({"step": step, "seconds": 0.6 * step, **train, "train/examples_per_second": 500.0})
        if step % 20 == 0:
            value = scale * (0.1 if step == 80 else 0.05)
            metrics = {f"{RANKER}/valid/all/count": 9, SELECTION: value, f"{SELECTION}_ci95_low": 0.0}
            records.append({"step": step, "seconds": 0.6 * step, **metrics})
    return records


def final_metrics(scale):
    metrics = {}
    for split in ("valid", "test"):
        for ranker, size in ((RANKER, scale), (BASELINE, 0.5)):
            for part in ("all", "warm"):
                place = f"{ranker}/{split}/{part}"
                metrics[f"{place}/count"] = 1234
                for metric in ("recall@10", "ndcg@10"):
                    metrics[f"{place}/{metric}"] = 0.1 * size
                    metrics |= {f"{place}/{metric}_ci95_low": 0.09 * size, f"{place}/{metric}_ci95_high": 0.11 * size}
    return metrics


def write_log(folder, records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
