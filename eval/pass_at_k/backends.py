"""What samples: a model in this process, vLLM in it, or servers; each with what its samples depend on."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from fdiv.errors import DataError
from fdiv.eval.pass_at_k.data import LoadedTasks
from fdiv.eval.pass_at_k.evaluation import Draw, PassKEvalConfig, draw_with_transformers
from fdiv.eval.pass_at_k.sampling import SamplingSettings, sample_with_vllm
from fdiv.inference.cache import ItemCache

if TYPE_CHECKING:
    from fdiv.inference.servers import CompletionServers

__all__ = ["Backend", "add_server_arguments", "backend_name", "end_tokens", "make_backend"]


@dataclasses.dataclass(frozen=True)
class Backend:
    """A back end that is ready to sample.

    Args:
        name: `transformers`, `vllm` or `server`.
        draw: samples.
        stop_ids: end tokens.
        dtype: number type, as the stamp has it.
        weights: what the samples depend on besides prompts and settings.
        context: the most tokens of prompt and completion; None: not known.
        model, servers: of a transformers, or a server back end.
    """

    name: str
    draw: Draw
    stop_ids: set[int]
    dtype: str
    weights: Any
    context: int | None = None
    model: Any = None
    servers: CompletionServers | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What the record of a result says of servers."""
        if self.servers is None:
            return {}
        urls = [server.base_url for server in self.servers.servers]
        return {"servers": urls, "served_model": self.servers.names}


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """`--server_url` and what goes with it."""
    server = parser.add_argument_group(
        "servers", "OpenAI-compatible ones of your own; the variable FDIV_API_KEY holds a key, if they want one"
    )  # fmt: skip
    server.add_argument(
        "--server_url",
        nargs="+",
        metavar="URL",
        help="sample from these servers of --model, --batch_size at once each",
    )
    server.add_argument("--server_model", metavar="NAME", help="what they call the model (--model)")
    server.add_argument("--server_timeout", type=float, default=600.0, help="seconds for one answer (600)")


def backend_name(args: argparse.Namespace) -> str:
    """What samples, by the options.

    Raises:
        DataError: options of servers without one, or of another back end with them.
    """
    if not args.server_url:
        if args.server_model is not None:
            raise DataError("--server_model goes with --server_url")
        return args.backend
    if args.backend == "vllm":
        raise DataError("--backend vllm samples in this process, --server_url elsewhere: leave one of them out")
    if args.adapter is not None:
        raise DataError(
            "--adapter does not go with --server_url: the server serves it, under the name of --server_model"
        )
    if not args.server_timeout > 0:
        raise DataError(f"--server_timeout {args.server_timeout}: must be above 0")
    return "server"


def make_backend(args: argparse.Namespace, config: PassKEvalConfig, loaded: LoadedTasks, tokenizer: Any) -> Backend:
    """The back end that the options name; a model is loaded, servers are asked what they serve.

    Raises:
        DataError: a model that cannot be loaded, or contrastive decoding with vLLM.
        RolloutError: a server that does not answer, or serves another model.
    """
    name = backend_name(args)
    if name != "transformers" and config.contrast() is not None:
        where = "vLLM" if name == "vllm" else "a server"
        raise DataError(
            "--decode contrastive needs both prompts' distributions at every token before it is sampled, and "
            f"{where} samples each prompt by itself: use --backend transformers"
        )
    return {"transformers": _transformers, "vllm": _vllm, "server": _server}[name](args, config, loaded, tokenizer)


def _transformers(args: argparse.Namespace, config: PassKEvalConfig, loaded: LoadedTasks, tokenizer: Any) -> Backend:
    from fdiv.inference.greedy import stop_token_ids
    from fdiv.models.fingerprints import weights_fingerprint
    from fdiv.models.loading import context_length, load_model

    model = load_model(args.model, args.adapter, args.dtype)
    dtype = str(model.dtype)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return Backend(
        "transformers",
        draw_with_transformers(model, tokenizer, config.batch_size),
        stop_token_ids(inner, tokenizer),
        dtype,
        f"{weights_fingerprint(model)}, {dtype.removeprefix('torch.')}",
        context_length(inner),
        model=model,
    )


def _vllm(args: argparse.Namespace, config: PassKEvalConfig, loaded: LoadedTasks, tokenizer: Any) -> Backend:
    from fdiv.inference.greedy import VLLMSource, stop_token_ids
    from fdiv.models.fingerprints import files_fingerprint
    from fdiv.models.loading import base_and_adapter, context_of

    name, adapter = base_and_adapter(args.model, args.adapter)
    source = VLLMSource(name, adapter, args.dtype, args.vllm_memory)
    stop_ids = end_tokens(name) | stop_token_ids(None, tokenizer)

    def draw(requests: Any, how: SamplingSettings, cache: ItemCache) -> Any:
        return sample_with_vllm(source, requests, how, cache=cache, stop_token_ids=stop_ids)

    weights = files_fingerprint(args.model, args.adapter)
    return Backend("vllm", draw, stop_ids, args.dtype, weights, context_of(args.model))


def _server(args: argparse.Namespace, config: PassKEvalConfig, loaded: LoadedTasks, tokenizer: Any) -> Backend:
    from fdiv.inference.greedy import stop_token_ids
    from fdiv.inference.servers import CompletionServers
    from fdiv.models.loading import vocabulary_of

    stop_ids = end_tokens(args.model) | stop_token_ids(None, tokenizer)
    servers = CompletionServers(
        args.server_url,
        args.model,
        args.server_model,
        count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        stop=loaded.stop,
        stop_token_ids=stop_ids,
        vocabulary=vocabulary_of(args.model),
        temperature=config.temperature,
        top_p=config.top_p,
        seed=args.seed,
        concurrency=config.batch_size,
        timeout=args.server_timeout,
    )

    def draw(requests: Any, how: SamplingSettings, cache: ItemCache) -> Any:
        title = "greedy completions" if how.temperature == 0 else "sampling"
        return servers.draw(requests, cache, title, temperature=how.temperature)

    served = f"served as {args.server_model or args.model}"
    return Backend("server", draw, stop_ids, "the server's", served, servers.context, servers=servers)


def end_tokens(model: str) -> set[int]:
    """End tokens of the model's generation config; chat models have several."""
    from transformers import GenerationConfig

    from fdiv.models.fetch import find_model

    try:
        named = GenerationConfig.from_pretrained(find_model(model)).eos_token_id
    except OSError:  # the model has none: the tokenizer's end token is left
        return set()
    return set(named if isinstance(named, list) else [] if named is None else [named])
