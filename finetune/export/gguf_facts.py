"""What a GGUF file says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.errors import ExportError


def read_gguf_facts(path: Path) -> dict[str, Any]:
    """What a GGUF file says of itself: architecture, sizes, context, tokenizer, name.

    Raises:
        ExportError: not a GGUF file.
    """
    from gguf import GGUFReader, LlamaFileType

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise ExportError(f"not a whole GGUF file: {error}", where=path, remedy="Make the gguf asset again") from error

    def value(key: str) -> Any:
        field = reader.fields.get(key)
        return None if field is None else field.contents()

    architecture = value("general.architecture")
    file_type = value("general.file_type")
    return {
        "name": value("general.name"),
        "version": value("general.version"),
        "size_label": value("general.size_label"),
        "licence": value("general.license"),
        "base_model": value("general.base_model.0.name"),
        "dataset": value("general.dataset.0.version"),
        "architecture": architecture,
        "file_type": None if file_type is None else LlamaFileType(file_type).name,
        "parameters": sum(int(tensor.n_elements) for tensor in reader.tensors),
        "tensors": len(reader.tensors),
        "context_length": value(f"{architecture}.context_length"),
        "embedding_length": value(f"{architecture}.embedding_length"),
        "block_count": value(f"{architecture}.block_count"),
        "vocabulary": len(reader.fields["tokenizer.ggml.tokens"].data),
        "tokenizer": value("tokenizer.ggml.model"),
        "pre_tokenizer": value("tokenizer.ggml.pre"),
        "chat_template": value("tokenizer.chat_template") is not None,
    }
