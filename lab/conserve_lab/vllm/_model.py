"""The model of a fleet: made once by vLLM's own Python, then found again by a hash of what made it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from conserve_lab.vllm._process import CommandFailedError, stream
from conserve_lab.vllm.errors import VllmStartError

__all__ = ["ModelShape", "eos_token_id", "make_model"]

SCRIPT = Path(__file__).parent / "runtime" / "tiny_model.py"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A tiny Llama: about 140,000 parameters, 512 bytes of KV a token, no download."""

    seed: int = 0
    layers: int = 2
    hidden: int = 64
    heads: int = 2
    kv_heads: int = 1
    positions: int = 16_384

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers, in float32."""
        return 2 * self.layers * self.kv_heads * (self.hidden // self.heads) * 4


def make_model(shape: ModelShape, *, python: Path, cache: Path) -> Path:
    """Make the model's directory, or find it.

    Args:
        shape: What to make.
        python: The interpreter of vLLM's environment.
        cache: Directory for such things.

    Returns:
        An absolute path, the same for the same shape.

    Raises:
        VllmStartError: The script failed.
    """
    recipe = json.dumps(asdict(shape), sort_keys=True)
    digest = hashlib.sha256(SCRIPT.read_bytes() + recipe.encode()).hexdigest()[:12]
    home = cache.absolute() / f"tiny-llama-{digest}"
    if home.is_dir():
        return home
    cache.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{home.name}.", dir=cache))
    try:
        for _ in stream([str(python), "-W", "ignore", str(SCRIPT), str(draft), recipe]):
            pass
        _publish(draft, home)
    except CommandFailedError as error:
        raise VllmStartError(f"could not make the tiny model: {error}; reinstall the vLLM environment") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return home


def _publish(draft: Path, home: Path) -> None:
    """Give a whole model its final name, unless somebody else made the same one meanwhile."""
    try:
        draft.rename(home)
    except OSError:
        if not home.is_dir():
            raise


def eos_token_id(model: Path) -> int:
    """The token with which the model ends an answer; a `logit_bias` on it makes a random model stop in time."""
    config = json.loads((model / "config.json").read_text())
    return int(config["eos_token_id"])
