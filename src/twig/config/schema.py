"""Every setting, described once: typed, frozen groups of fields, and the checks between them.

A setting's help text, default and rule are here and nowhere else: `docs/settings.md` and most error messages
are made from the fields below. Names are those of TRL and transformers if the meaning is the same. Knows
nothing about files, YAML or the command line (`load.py` puts the groups together and reads those), nor about
what acts on a setting. The settings of an algorithm are in its own file in `core/algorithms`.

A field says what it affects if that is not what is learned (`AFFECTS`): how long the run is, what is
measured, how much is computed at once, or what is shown and saved.
"""

import re
from importlib.util import find_spec
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator
from pydantic.config import JsonDict

from twig.common.errors import UserError, as_validator
from twig.common.frozen import Frozen
from twig.common.python_files import check_spec
from twig.config.messages import check_budget, check_duration

AFFECTS = ("results", "length", "measurement", "speed", "display")
LENGTH: JsonDict = {"affects": "length"}
MEASUREMENT: JsonDict = {"affects": "measurement"}
SPEED: JsonDict = {"affects": "speed"}
DISPLAY: JsonDict = {"affects": "display"}

Text = Annotated[str, Field(min_length=1)]
Index = Annotated[int, Field(ge=0)]
T = TypeVar("T")


class _OneAlone:
    """Says in the JSON schema that a list may be written as its only value, or as one of `others`."""

    def __init__(self, *others: str) -> None:
        self.others = [{"enum": list(others)}] if others else []

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        several = handler(schema)
        return {"anyOf": [several["items"], *self.others, several]}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int | float) else value


OneOrMore = Annotated[list[T], BeforeValidator(_as_list), _OneAlone()]
_Weights = Annotated[list[float], Field(min_length=1), BeforeValidator(_as_list), _OneAlone()]
Tracker = Literal["tensorboard", "wandb", "trackio"]


def _trackers(value: Any) -> Any:
    if value in ("all", ["all"]):
        return [name for name in get_args(Tracker) if find_spec(name)]
    return [] if value in ("none", ["none"]) else _as_list(value)


class TaskSettings(Frozen):
    """The problems, how the model is asked, and how an answer is rewarded."""

    name: Literal["multiplication", "svamp", "gsm8k", "custom"] = Field(
        description="The task. `custom` is your own data (`task.path`) with your own reward "
        "(`task.reward_file`)."
    )
    path: Text | None = Field(
        default=None,
        description="Data to read in place of the task's own: a JSON, JSONL or Parquet file, a folder of "
        "them, or (`custom`) a data set on the Hub.",
        examples=["data/train.jsonl"],
    )
    revision: Text | None = Field(
        default=None, description="Branch, tag or commit of a data set on the Hub.", examples=["main"]
    )
    subset: Text | None = Field(
        default=None,
        description="Configuration of a data set on the Hub. null: the task's own, or the only one there is.",
        examples=["main"],
    )
    prompt_template: Text | None = Field(
        default=None,
        description="Text of the prompt with the columns of a row in braces. null: the task's own.",
        examples=["Question: {question}\nAnswer:"],
    )
    prompt_column: Text = Field(
        default="prompt", description="Column that holds the prompt. Used by `custom` only."
    )
    system_prompt: Text | None = Field(
        default=None,
        description="Text of the system message. null: the task's own.",
        examples=["Think step by step."],
    )
    chat: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Whether prompts go through the chat template. `auto`: if the tokenizer has one.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default={}, description="Passed to the chat template.", examples=["{enable_thinking: false}"]
    )
    skip_special_tokens: bool = Field(
        default=True,
        description="Whether rewards, stop texts and reports read a completion without its special tokens. "
        "false: they stay in the text, the end token too.",
    )
    train_split: Text | None = Field(
        default=None, description="Split to train on. null: the task's own.", examples=["train"]
    )
    eval_split: Text | None = Field(
        default=None, description="Split to evaluate on. null: the task's own.", examples=["test"]
    )
    train_size: int | None = Field(
        default=None, ge=1, description="Problems to train on. null: all there are.", examples=[1000]
    )
    eval_size: int | None = Field(
        default=None, ge=1, description="Problems kept for evaluation. null: all.", examples=[1000]
    )
    digits: Annotated[list[Annotated[int, Field(ge=1, le=9)]], Field(min_length=2, max_length=2)] = Field(
        default=[3, 2], description="Digits of the two factors. Used by `multiplication` only."
    )
    reward_file: str | None = Field(
        default=None,
        description="Python file and the reward functions in it; each has TRL's signature. null: the "
        "task's own reward.",
        examples=["rewards.py:exact,short"],
    )
    reward_weights: _Weights | None = Field(
        default=None,
        description="Weight of each reward function in the sum. null: 1 each.",
        examples=[[1.0, 0.5]],
    )
    reward_timeout: float | None = Field(
        default=None,
        gt=0,
        description="Seconds that one call of a reward function may take. null: any.",
        examples=[60],
        json_schema_extra=DISPLAY,
    )
    reward_on_timeout: float | None = Field(
        default=None,
        description="The score of every completion of a call that takes longer. null: the run stops.",
        examples=[0.0],
    )
    correct_at: float = Field(
        default=1.0,
        description="A completion counts as right when its weighted reward reaches this. Used only if "
        "the task cannot tell by itself (`custom`).",
    )

    @model_validator(mode="after")
    @as_validator
    def _is_timed(self) -> "TaskSettings":
        if self.reward_on_timeout is not None and self.reward_timeout is None:
            raise UserError(
                "task.reward_on_timeout",
                "nothing times out without task.reward_timeout",
                "Set one, such as task.reward_timeout=60",
            )
        return self

    @field_validator("reward_file")
    @classmethod
    @as_validator
    def _names_functions(cls, value: str | None) -> str | None:
        return value and check_spec(value, "task.reward_file")


_PLANNED = "Changes memory and speed, not results. null: planned, see `memory.budget`."


class Model(Frozen):
    """The language model that is trained, and how it is held."""

    name: Text = Field(
        description="`tiny-arithmetic` (the embedded model), a Hugging Face Hub id, or the path of a "
        "local model: a folder, or a GGUF file.",
        examples=["tiny-arithmetic"],
    )
    gguf_file: Text | None = Field(
        default=None,
        description="GGUF file in the folder or the Hub repository `name`; leave it out where `name` is the "
        "file itself. Config, tokenizer and chat template come from the file, and its weights are held in "
        "`dtype`: `pip install gguf`.",
        examples=["SmolLM2-135M-Instruct-Q8_0.gguf"],
    )
    revision: Text | None = Field(
        default=None, description="Branch, tag or commit on the Hub.", examples=["main"]
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        default="auto",
        description="Number type of the base model. `auto`: float32 on a CPU; on a GPU bfloat16 if it has "
        "it, else float16. Adapter, log-probabilities and loss are float32 (or wider) whatever is set here.",
    )
    quantization: Literal["nf4", "int8"] | None = Field(
        default=None,
        description="Holds the matrices of the base's layers in 4 bits (`nf4`) or 8 (`int8`) through "
        "bitsandbytes, on a CPU or a CUDA GPU: `pip install bitsandbytes`. Embeddings, norms and "
        "head keep `dtype`, the adapter stays float32.",
        examples=["nf4"],
    )
    device: Text = Field(
        default="auto",
        description="`auto` takes a GPU if there is one; else as torch writes it: `cpu`, `cuda`, "
        "`cuda:1`, `mps`.",
    )
    adapter: Text | None = Field(
        default=None,
        description="Path, or id on the Hub, of a PEFT LoRA adapter to continue from. It keeps its rank, "
        "alpha, modules and layers, whatever the defaults of `lora` are.",
        examples=["runs/quickstart/adapter"],
    )
    attn_implementation: Literal["auto", "sdpa", "eager"] = Field(
        default="auto", description="Attention kernel. `auto` takes sdpa if the model has it."
    )
    engine: Literal["trie", "plain"] = Field(
        default="trie",
        description="`trie` runs each shared prefix once and reuses the frozen lower layers. `plain` is the "
        "ordinary batched forward: slower, the same gradient, for families that the trie engine refuses.",
    )
    kernels: Literal["auto", "onednn", "torch"] = Field(
        default="auto",
        description="What multiplies by the frozen float32 matrices on a CPU. `auto`: oneDNN if it is at "
        "least 1.3 times as fast as torch's own library, measured for a second before the run; `twig env` "
        "shows both. `config.yaml` keeps what was chosen. Results differ by rounding.",
    )
    num_threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of torch for a model that Twig loads; null leaves the choice to torch. A "
        "model of a few million parameters gains little from a second one and loses much if the "
        "machine has other work.",
        json_schema_extra=SPEED,
    )
    trust_remote_code: bool = Field(
        default=False, description="Allow a model from the Hub to run its own Python code."
    )


class Lora(Frozen):
    """The adapter: the only weights that change."""

    r: int = Field(default=16, ge=1, description="Rank of the adapter matrices.")
    alpha: float = Field(default=32.0, gt=0, description="The adapter's output is multiplied by alpha / r.")
    target_modules: Text | Annotated[list[Text], Field(min_length=1)] = Field(
        default=["q_proj", "v_proj"],
        description="Linear modules that get an adapter: a list of names, `all-linear` (all of the layers), "
        "or a regular expression over whole names, as in PEFT. By default, layers that keep a state "
        "(recurrences, short convolutions) get one on their `in_proj` modules too.",
        examples=[["q_proj", "v_proj"]],
    )
    exclude_modules: Text | list[Text] | None = Field(
        default=None,
        description="Modules that get none nevertheless: names or a regular expression.",
        examples=[["gate_proj"]],
    )
    layers: Literal["last_third", "all"] | Annotated[list[Index], Field(min_length=1)] = Field(
        default="last_third",
        description="Layers that get an adapter, counted from 0. The layers below the lowest one never "
        "change, so they run once a token: fewer layers cost less time and memory.",
        examples=["last_third", [22, 23]],
    )
    layers_pattern: Text | None = Field(
        default=None,
        description="Name of the module list whose entries `layers` counts. null: the model's longest.",
        examples=["layers"],
    )
    use_rslora: bool = Field(
        default=False, description="The adapter's output is multiplied by alpha / sqrt(r): rank-stabilised."
    )
    use_dora: bool = Field(
        default=False,
        description="Also trains the length of each row of an adapted matrix (DoRA). Slower: each forward "
        "pass computes those lengths.",
    )
    rank_pattern: dict[Text, Annotated[int, Field(ge=1)]] = Field(
        default={},
        description="Other ranks for some modules: names or regular expressions, the first that matches.",
        examples=[{"down_proj": 8}],
    )
    alpha_pattern: dict[Text, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="Other values of alpha for some modules.", examples=[{"down_proj": 16.0}]
    )

    @model_validator(mode="after")
    @as_validator
    def _check_expressions(self) -> "Lora":
        """Raises Invalid for what is no regular expression."""
        for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            value = getattr(self, key)
            for text in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
                try:
                    re.compile(text)
                except re.error as error:
                    problem = f"{text!r} is no regular expression ({error})"
                    raise UserError(f"lora.{key}", problem, "Escape what it shall match as it is") from None
        return self


class Rollout(Frozen):
    """How completions are sampled."""

    num_generations: int = Field(default=16, ge=2, description="Completions per prompt (the group).")
    prompts_per_step: int = Field(default=8, ge=1, description="Prompts of each step's batch.")
    max_completion_length: int = Field(
        default=256, ge=1, description="Tokens after which a completion is cut off."
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="Sampling temperature while training. Log-probabilities are those at this temperature.",
    )
    redraw: int = Field(
        default=0,
        ge=0,
        description="How many times a step replaces the prompts whose completions all got the same reward, "
        "which teach nothing, by the next ones of the data. What was sampled for them counts as sampled.",
        examples=[2],
    )
    curriculum: float = Field(
        default=1.0,
        ge=0.01,
        le=1,
        description="Chance that a problem is sampled when its turn comes, if the completions of its last "
        "group all got the same reward: all right or all wrong. Otherwise its turn passes to the next "
        "problem of the data. 1: every problem in turn.",
        examples=[0.25],
    )
    wave_size: int | None = Field(
        default=None,
        ge=1,
        description=f"Completions sampled at once. {_PLANNED}",
        examples=[128],
        json_schema_extra=SPEED,
    )
    packed_weights: bool | None = Field(
        default=None,
        description="Whether `model.kernels=onednn` samples with copies of the frozen matrices in a layout "
        "that is faster at few rows. They are freed before the update. Changes memory and speed, not "
        "results. null: if there is room.",
        examples=[False],
        json_schema_extra=SPEED,
    )
    suppress_tokens: OneOrMore[Index] = Field(
        default=[], description="Token ids that are never sampled.", examples=[[0, 1]]
    )
    decode: Literal["auto", "plain", "graph", "compiled"] = Field(
        default="auto",
        description="How tokens are sampled. `plain` calls the layers one by one. `graph` captures a step "
        "over buffers of a fixed size as a CUDA graph; `compiled` has torch.compile fuse it first, for some "
        "seconds before the first step. The tokens are the same but for rounding. `auto`: on a CUDA device "
        "`compiled` if the run is long enough to gain by it, else `graph`, and `plain` elsewhere or if there "
        "is too little memory.",
        json_schema_extra=SPEED,
    )
    stop: OneOrMore[Text] = Field(
        default=[],
        description="Texts that end a completion, beside the end tokens; the text stays part of it.",
        examples=[["\nQuestion:"]],
    )


class StopWhen(Frozen):
    """When a run ends before its last step, by the evaluations of `eval.steps`."""

    @property
    def key(self) -> str | None:
        """The first setting that ends a run; None if nothing does."""
        asked = (name for name, value in self.model_dump().items() if value is not None)
        return next((f"train.stop_when.{name}" for name in asked), None)

    accuracy: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="The run ends after an evaluation with at least this share of right answers.",
        examples=[0.9],
        json_schema_extra=LENGTH,
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="The run ends after so many evaluations in a row without a better one than before them.",
        examples=[5],
        json_schema_extra=LENGTH,
    )


class Train(Frozen):
    """The optimizer, how long, and how often the run is saved."""

    learning_rate: float = Field(default=1e-4, gt=0, description="Learning rate.")
    max_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps; each samples one batch and takes algorithm.num_iterations optimizer steps on it. "
        "null: as many as num_train_epochs takes.",
        examples=[100],
        json_schema_extra=LENGTH,
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens to sample: the run ends after the step that reaches them, if not before. Runs "
        "that are compared get the same number. null: no such end.",
        examples=[500000],
        json_schema_extra=LENGTH,
    )
    stop_when: StopWhen = Field(default_factory=StopWhen, description="When a run ends before its last step.")
    num_train_epochs: float = Field(
        default=1.0,
        gt=0,
        description="Passes over the training data. Used if max_steps is null.",
        json_schema_extra=LENGTH,
    )
    optim: Literal["adamw_torch", "sgd"] = Field(
        default="adamw_torch", description="Optimizer, by its name in transformers."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay of the adapter.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of Adam's first moment.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of Adam's second moment.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="Added to the square root in Adam's divisor.")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="The gradient is scaled down to this norm. 0: never."
    )
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = Field(
        default="constant", description="How the learning rate moves, by its name in transformers."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps over which the learning rate rises from 0.")
    save_steps: int = Field(
        default=50,
        ge=0,
        description="A checkpoint every so many steps. 0: only at the end or when stopped.",
        json_schema_extra=DISPLAY,
    )
    save_total_limit: int | None = Field(
        default=2,
        ge=1,
        description="Checkpoints kept; the oldest go first. null: all.",
        json_schema_extra=DISPLAY,
    )
    max_time: Annotated[str, AfterValidator(check_duration)] | Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="The run stops, saved, before the step that would take it beyond this time, counted from "
        "when it begins or resumes: seconds, or days, hours, minutes and seconds. null: no limit.",
        examples=["2h30m"],
        json_schema_extra=DISPLAY,
    )
    max_skipped_steps: int = Field(
        default=5,
        ge=1,
        description="Steps in a row with a loss or gradient that is not finite, until the run ends.",
        json_schema_extra=DISPLAY,
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Seed of the order of the data, the sampling and the adapter."
    )
    pack_size: int | None = Field(
        default=None,
        ge=1,
        description=f"Most tokens in one forward and backward pass. {_PLANNED}",
        examples=[1024],
        json_schema_extra=SPEED,
    )
    head_chunk: int | None = Field(
        default=None,
        ge=1,
        description=f"Logits computed at once in the update. {_PLANNED}",
        examples=[2**22],
        json_schema_extra=SPEED,
    )
    checkpoint_layers: bool | None = Field(
        default=None,
        description="Run the upper layers but the last again in the backward pass, up to a third slower. "
        + _PLANNED,
        examples=[True],
        json_schema_extra=SPEED,
    )

    @model_validator(mode="after")
    @as_validator
    def _warmup_has_effect(self) -> "Train":
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            raise UserError(
                "train.warmup_steps",
                "train.lr_scheduler_type=constant has no warm-up",
                "Set train.lr_scheduler_type=constant_with_warmup",
            )
        return self


class Eval(Frozen):
    """Measuring accuracy on problems that are never trained on."""

    steps: int = Field(
        default=0,
        ge=0,
        description="Evaluate every so many steps. 0: only before and after training.",
        json_schema_extra=MEASUREMENT,
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="Problems per evaluation. null: all of the task's.",
        examples=[500],
        json_schema_extra=MEASUREMENT,
    )
    batch_size: int | None = Field(
        default=None,
        ge=1,
        description=f"Problems answered at once. {_PLANNED}",
        examples=[64],
        json_schema_extra=SPEED,
    )
    before: bool = Field(
        default=True, description="Evaluate before training too.", json_schema_extra=MEASUREMENT
    )


class Memory(Frozen):
    """How much memory a run may take.

    Before a run loads its model, sizes that are null become the quickest ones that fit; they are kept in
    `config.yaml`. If none fit, the run says what to change and ends; with `auto`, it begins.
    """

    budget: Annotated[str, AfterValidator(check_budget)] | Annotated[float, Field(gt=0, le=1)] = Field(
        default="auto",
        description="`auto`: what is free on the device at the beginning. Else a size, or a share of that. A "
        "twentieth of it is not planned with. On a CUDA device a size or a share is also a limit until the "
        "run ends: it includes what CUDA itself takes, and if torch needs more than the rest, the run "
        "continues in smaller pieces.",
        examples=["6GiB"],
        json_schema_extra=SPEED,
    )


class Log(Frozen):
    """What is written and shown while training."""

    report_to: Annotated[list[Tracker], BeforeValidator(_trackers), _OneAlone("all", "none")] = Field(
        default=[],
        description="Trackers that get the metrics too; each must be installed. wandb and trackio also "
        "get the settings. As in transformers, `all` means those that are installed, `none` none.",
        examples=[["tensorboard"]],
        json_schema_extra=DISPLAY,
    )
    completions_steps: int = Field(
        default=25,
        ge=0,
        description="Write the sampled completions every so many steps, and at the first one. 0: never.",
        json_schema_extra=DISPLAY,
    )
    progress: Literal["auto", "live", "plain", "quiet"] = Field(
        default="auto",
        description="Progress display, also of `twig.train`. `auto`: live on a terminal and in a notebook, "
        "plain lines elsewhere.",
        json_schema_extra=DISPLAY,
    )
