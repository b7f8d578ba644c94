"""The groups of settings: typed, frozen fields, each described once, and the checks between them.

Knows nothing about files, YAML or the command line (`config.py` puts the groups together and reads those),
nor about what acts on a setting. `docs/settings.md` and the words of most errors are made from the fields
below. Names are those of TRL and transformers where the meaning is the same.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from twig.records import UserError
from twig.task_settings import Frozen, Index, Text
from twig.wording import check_budget, check_duration

_PLANNED = "Changes memory and speed, not results. null: planned, see `memory.budget`."


class Model(Frozen):
    """The language model that is trained, and how it is held."""

    name: Text = Field(
        description="`tiny-arithmetic` (the embedded model), a Hugging Face Hub id, or the path of a "
        "local model.",
        examples=["tiny-arithmetic"],
    )
    revision: Text | None = Field(None, description="Branch, tag or commit on the Hub.", examples=["main"])
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto",
        description="Number type of the base model. `auto`: float32 on a CPU; on a GPU bfloat16 where it has "
        "it, else float16. Adapter, log-probabilities and loss are float32 (or wider) whatever is set here.",
    )
    quantization: Literal["nf4", "int8"] | None = Field(
        None,
        description="Holds the matrices of the base's layers in 4 bits (`nf4`) or 8 (`int8`) through "
        "bitsandbytes, on a CPU or a CUDA GPU: `pip install 'twig-rl[quantization]'`. Embeddings, norms and "
        "head keep `dtype`, the adapter stays float32.",
        examples=["nf4"],
    )
    device: Text = Field(
        "auto",
        description="`auto` takes a GPU if there is one; else as torch writes it: `cpu`, `cuda`, "
        "`cuda:1`, `mps`.",
    )
    adapter: Text | None = Field(
        None,
        description="Path, or id on the Hub, of a PEFT LoRA adapter to continue from. It keeps its rank, "
        "alpha, modules and layers, whatever the defaults of `lora` are.",
        examples=["runs/quickstart/adapter"],
    )
    attn_implementation: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="Attention kernel. `auto` takes sdpa where the model has it."
    )
    engine: Literal["trie", "plain"] = Field(
        "trie",
        description="`trie` runs each shared prefix once and reuses the frozen lower layers. `plain` is the "
        "ordinary batched forward: slower, the same gradient, for families that the trie engine refuses.",
    )
    num_threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of torch for a model that Twig loads; null leaves the choice to torch. A "
        "model of a few million parameters gains little from a second one and loses much where the "
        "machine has other work.",
    )
    trust_remote_code: bool = Field(
        False, description="Allow a model from the Hub to run its own Python code."
    )


class Lora(Frozen):
    """The adapter: the only weights that change."""

    r: int = Field(16, ge=1, description="Rank of the adapter matrices.")
    alpha: float = Field(32.0, gt=0, description="The adapter's output is multiplied by alpha / r.")
    target_modules: list[Text] = Field(
        ["q_proj", "v_proj"], min_length=1, description="Names of the linear modules that get an adapter."
    )
    layers: Literal["last_third", "all"] | Annotated[list[Index], Field(min_length=1)] = Field(
        "last_third",
        description="Layers that get an adapter, counted from 0. The layers below the lowest one never "
        "change, so they run once a token: fewer layers cost less time and memory.",
        examples=["last_third", [22, 23]],
    )


class Rollout(Frozen):
    """How completions are sampled."""

    num_generations: int = Field(16, ge=2, description="Completions per prompt (the group).")
    prompts_per_step: int = Field(8, ge=1, description="Prompts of each step's batch.")
    max_completion_length: int = Field(256, ge=1, description="Tokens after which a completion is cut off.")
    temperature: float = Field(
        1.0,
        gt=0,
        description="Sampling temperature while training. Log-probabilities are those at this temperature.",
    )
    wave_size: int | None = Field(
        None, ge=1, description=f"Completions sampled at once. {_PLANNED}", examples=[128]
    )
    suppress_tokens: list[Index] = Field(
        [], description="Token ids that are never sampled.", examples=[[0, 1]]
    )
    decode: Literal["auto", "plain", "graph", "compiled"] = Field(
        "auto",
        description="How tokens are sampled. `plain` calls the layers one by one. `graph` captures a step "
        "over buffers of a fixed size as a CUDA graph; `compiled` has torch.compile fuse it first, for some "
        "seconds before the first step. The tokens are the same but for rounding. `auto`: on a CUDA device "
        "`compiled` if the run is long enough to gain by it, else `graph`, and `plain` elsewhere or if there "
        "is too little memory.",
    )
    stop: list[Text] = Field(
        [],
        description="Texts that end a completion, beside the end tokens; the text stays part of it.",
        examples=[["\nQuestion:"]],
    )


class Train(Frozen):
    """The optimizer, how long, and how often the run is saved."""

    learning_rate: float = Field(1e-4, gt=0, description="Learning rate.")
    max_steps: int | None = Field(
        None,
        ge=1,
        description="Steps; each samples one batch and takes algorithm.num_iterations optimizer steps on it. "
        "null: as many as num_train_epochs takes.",
        examples=[100],
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens to sample: the run ends after the step that reaches them, if not before. Runs "
        "that are compared get the same number. null: no such end.",
        examples=[500000],
    )
    num_train_epochs: float = Field(
        1.0, gt=0, description="Passes over the training data. Used where max_steps is null."
    )
    optim: Literal["adamw_torch", "sgd"] = Field(
        "adamw_torch", description="Optimizer, by its name in transformers."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of the adapter.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of Adam's first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of Adam's second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Added to the square root in Adam's divisor.")
    max_grad_norm: float = Field(1.0, ge=0, description="The gradient is scaled down to this norm. 0: never.")
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = Field(
        "constant", description="How the learning rate moves, by its name in transformers."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises from 0.")
    save_steps: int = Field(
        50, ge=0, description="A checkpoint every so many steps. 0: only at the end or when stopped."
    )
    save_total_limit: int | None = Field(
        2, ge=1, description="Checkpoints kept; the oldest go first. null: all."
    )
    max_time: Annotated[str, AfterValidator(check_duration)] | Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="The run stops, saved, before the step that would take it beyond this time, counted from "
        "when it begins or goes on: seconds, or days, hours, minutes and seconds. null: no limit.",
        examples=["2h30m"],
    )
    max_skipped_steps: int = Field(
        5, ge=1, description="Steps in a row with a loss or gradient that is not finite, until the run ends."
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of the order of the data, the sampling and the adapter."
    )
    pack_size: int | None = Field(
        None, ge=1, description=f"Most tokens in one forward and backward pass. {_PLANNED}", examples=[1024]
    )
    head_chunk: int | None = Field(
        None, ge=1, description=f"Logits computed at once in the update. {_PLANNED}", examples=[2**22]
    )
    checkpoint_layers: bool | None = Field(
        None,
        description=f"Run the upper layers again in the backward pass, a third slower. {_PLANNED}",
        examples=[True],
    )

    @model_validator(mode="after")
    def _warmup_has_effect(self) -> "Train":
        if self.warmup_steps and self.lr_scheduler_type == "constant":
            raise UserError(
                "train.warmup_steps: train.lr_scheduler_type=constant has no warm-up; "
                "write train.lr_scheduler_type=constant_with_warmup"
            )
        return self


class Eval(Frozen):
    """Measuring accuracy on problems that are never trained on."""

    steps: int = Field(
        0, ge=0, description="Evaluate every so many steps. 0: only before and after training."
    )
    limit: int | None = Field(
        None, ge=1, description="Problems per evaluation. null: all of the task's.", examples=[500]
    )
    batch_size: int | None = Field(
        None, ge=1, description=f"Problems answered at once. {_PLANNED}", examples=[64]
    )
    before: bool = Field(True, description="Evaluate before training too.")


class Memory(Frozen):
    """How much memory a run may take.

    Before a run loads its model, sizes that are null become the quickest ones that fit; they are kept in
    `config.yaml`. Where none fit, the run says what to change and ends; with `auto`, it begins.
    """

    budget: Annotated[str, AfterValidator(check_budget)] | Annotated[float, Field(gt=0, le=1)] = Field(
        "auto",
        description="`auto`: what is free on the device at the beginning. Else a size, or a share of that. A "
        "twentieth of it is not planned with. On a CUDA device a size or a share is also a limit until the "
        "run ends: it includes what CUDA itself takes, and if torch needs more than the rest, the run "
        "continues in smaller pieces.",
        examples=["6GiB"],
    )


class Log(Frozen):
    """What is written and shown while training."""

    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [],
        description="Trackers that get the metrics too; each must be installed. wandb and trackio also "
        "get the settings.",
        examples=[["tensorboard"]],
    )
    completions_steps: int = Field(
        25,
        ge=0,
        description="Write the sampled completions every so many steps, and at the first one. 0: never.",
    )
    progress: Literal["auto", "live", "plain", "quiet"] = Field(
        "auto", description="Progress display. `auto`: live on a terminal, plain lines elsewhere."
    )
