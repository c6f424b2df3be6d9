"""Put pretrained sisters into the repository: zoo/NAME from their checkpoints, records/pretrain/NAME.json from their records.

Usage: python recipes/install_sisters.py RESULTS

RESULTS holds NAME.safetensors for every sister, and a folder NAME with what else `pretrain_matched.py` wrote to --out.
Refused when a checkpoint is not the one that its record names, or when the sisters did not see the same tokens.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from pretrain import TOKENIZER_FILES, TOKENIZER_PATH
from pretrain_matched import SISTERS_PATH, load_sisters

from ssmtune.errors import DataError
from ssmtune.records import file_sha256, read_record, write_json

ROOT = Path(__file__).resolve().parents[1]
FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def install(results: Path, root: Path) -> None:
    """Copy checkpoints, configs, tokenizer, notices and records. Raises `DataError` before anything is written."""
    names = list(load_sisters(SISTERS_PATH))
    records = {name: read_record(results / name / "pretrain.json", kind="pretrain") for name in names}
    for name, record in records.items():
        found = file_sha256(results / f"{name}.safetensors")
        if found != record["checkpoint_sha256"]:
            raise DataError(f"{name}.safetensors: sha256 is {found}; its record says {record['checkpoint_sha256']}.")
        if record["status"] != "done":
            raise DataError(f"{name}: its run ended as {record['status']}. Run it again.")
    seen = {name: (r["num_steps"], r["num_tokens"], r["data"]["arrays"]) for name, r in records.items()}
    if len({str(value) for value in seen.values()}) != 1:
        steps = {name: value[:2] for name, value in seen.items()}
        raise DataError(f"the sisters did not see the same tokens (steps, tokens): {steps}. Run them together.")
    for name, record in records.items():
        folder = root / "zoo" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            shutil.copyfile(results / name / file, folder / file)
        shutil.copyfile(results / f"{name}.safetensors", folder / "model.safetensors")
        shutil.copyfile(TOKENIZER_PATH / "NOTICE.md", folder / "NOTICE.md")
        write_json(root / "records" / "pretrain" / f"{name}.json", record)


def main() -> None:
    parser = argparse.ArgumentParser(description="Put pretrained sisters into zoo/ and records/pretrain/.")
    parser.add_argument("results", type=Path)
    install(parser.parse_args().results, ROOT)
    print("installed; now: python recipes/render_docs.py")


if __name__ == "__main__":
    main()
