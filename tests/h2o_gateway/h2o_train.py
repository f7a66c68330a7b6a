"""A stand-in for H2O LLM Studio's ``train.py``: ``python h2o_train.py -Y cfg.yaml``.

It really trains, with peft and a plain loop, what the configuration says: the same Parquet columns put
together in the same way, the same schedule by batch, an optimizer step at the same batches. It writes
what H2O LLM Studio 1.14 writes: ``adapter_model/`` beside ``checkpoint.pth`` after each epoch, progress
in ``charts_cache/`` (with diskcache, as there), ``logs.log`` and, at the end, ``flags.json``. Like the
original it needs a GPU selected, and leaves no flag when it fails.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from pathlib import Path
from typing import Any

import yaml

logger = logging.getLogger("h2o_train")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-Y", "--yaml", type=Path, required=True)
    cfg = yaml.safe_load(parser.parse_args().yaml.read_text(encoding="utf-8"))
    output = Path(cfg["output_directory"])
    output.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(output / "logs.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s - %(levelname)s: %(message)s", handlers=handlers)
    run(cfg, output)


def run(cfg: dict[str, Any], output: Path) -> None:
    if cfg["problem_type"] != "text_causal_language_modeling" or not cfg["environment"]["gpus"]:
        raise ValueError("Configuration contains errors: no GPU selected, or another problem type")
    import torch
    from transformers import AutoTokenizer, get_scheduler

    training = cfg["training"]
    torch.manual_seed(cfg["environment"]["seed"])
    tokenizer = AutoTokenizer.from_pretrained(cfg["llm_backbone"])
    samples = [encode(chain, tokenizer, cfg["tokenizer"]["max_length"]) for chain in chains(cfg["dataset"])]
    model = lora_model(cfg)
    model.train()
    epoch_steps = math.ceil(len(samples) / training["batch_size"])
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=training["learning_rate"],
        weight_decay=training["weight_decay"],
    )
    scheduler = get_scheduler(
        {"Cosine": "cosine", "Linear": "linear", "Constant": "constant_with_warmup"}[training["schedule"]],
        optimizer,
        num_warmup_steps=training["warmup_epochs"] * epoch_steps,
        num_training_steps=training["epochs"] * epoch_steps,
    )
    charts = Charts(output)
    charts.log("internal", "total_training_steps", training["epochs"] * epoch_steps * training["batch_size"])
    begun, curr_step = time.time(), 0
    for epoch in range(training["epochs"]):
        logger.info("Training Epoch: %d / %d", epoch + 1, training["epochs"])
        random.Random(cfg["environment"]["seed"] + epoch).shuffle(samples)
        for itr in range(epoch_steps):
            curr_step += training["batch_size"]
            batch = samples[itr * training["batch_size"] : (itr + 1) * training["batch_size"]]
            loss = model(**collate(batch, tokenizer.pad_token_id or tokenizer.eos_token_id)).loss
            (loss / training["grad_accumulation"]).backward()
            if itr % training["grad_accumulation"] == 0:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            charts.log("train", "loss", loss.item(), curr_step)
            charts.log("meta", "lr", scheduler.get_last_lr()[0], curr_step)
            charts.log("internal", "current_step", curr_step)
        logger.info("train loss: %.2f", loss.item())
        logger.info("Saving last model checkpoint to %s", output)
        torch.save({"model": model.state_dict()}, output / "checkpoint.pth")
        model.save_pretrained(str(output / "adapter_model"))
    flags = {"status": "finished", "info": f"Runtime: {time.strftime('%H:%M:%S', time.gmtime(time.time() - begun))}"}
    (output / "flags.json").write_text(json.dumps(flags), encoding="utf-8")


def chains(dataset: dict[str, Any]) -> list[list[dict[str, str]]]:
    """Whole conversations, round by round, as ``limit_chained_samples`` makes them."""
    import pyarrow.parquet as pq

    rows = pq.read_table(dataset["train_dataframe"]).to_pylist()
    texts = ("text_system_start", "text_prompt_start", "text_answer_separator")
    assert not any(dataset[name] for name in texts), "not what the gateway writes"
    assert dataset["limit_chained_samples"]
    by_id = {row[dataset["id_column"]]: row for row in rows}
    parents = {row[dataset["parent_id_column"]] for row in rows}
    found = []
    for identifier, row in by_id.items():
        if identifier in parents:
            continue
        chain = [row]
        while parent := chain[0][dataset["parent_id_column"]]:
            chain.insert(0, by_id[parent])
        found.append(chain)
    return found


def encode(chain: list[dict[str, str]], tokenizer: Any, max_length: int) -> tuple[list[int], list[int]]:
    """Token ids and labels; the end is kept where they are too long."""
    ids: list[int] = []
    labels: list[int] = []
    for number, row in enumerate(chain):
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"][-max_length:]
        if number == 0:
            prompt = tokenizer(row["system"], add_special_tokens=False)["input_ids"][-max_length:] + prompt
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"][:max_length]
        ids += prompt + answer
        labels += [-100] * len(prompt) + answer
    return ids[-max_length:], labels[-max_length:]


def lora_model(cfg: dict[str, Any]) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    training = cfg["training"]
    dtype = getattr(torch, cfg["architecture"]["backbone_dtype"])
    backbone = AutoModelForCausalLM.from_pretrained(cfg["llm_backbone"], dtype=dtype)
    linear = {
        name.rpartition(".")[2]
        for name, module in backbone.named_modules()
        if isinstance(module, torch.nn.Linear) and "head" not in name
    }
    named = training["lora_target_modules"]
    lora = LoraConfig(
        use_dora=training["use_dora"],
        r=training["lora_r"],
        lora_alpha=training["lora_alpha"],
        target_modules=named.split(",") if named else sorted(linear),
        lora_dropout=training["lora_dropout"],
        bias="none",
        use_rslora=training["use_rslora"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(backbone, lora)


def collate(batch: list[tuple[list[int], list[int]]], pad: int) -> dict[str, Any]:
    import torch

    width = max(len(ids) for ids, _ in batch)
    return {
        "input_ids": torch.tensor([[pad] * (width - len(ids)) + ids for ids, _ in batch]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in batch]),
        "labels": torch.tensor([[-100] * (width - len(labels)) + labels for _, labels in batch]),
    }


class Charts:
    """What H2O LLM Studio's LocalLogger writes."""

    def __init__(self, output: Path) -> None:
        from diskcache import Cache

        self.cache = Cache(str(output / "charts_cache"))

    def log(self, subset: str, name: str, value: float, step: float | None = None) -> None:
        group = self.cache.get(subset, {})
        series = group.setdefault(name, {"steps": [], "values": []})
        series["steps"].append(step)
        series["values"].append(float(value))
        self.cache[subset] = group


if __name__ == "__main__":
    main()
