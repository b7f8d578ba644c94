"""Every setting, described once: typed, frozen groups of fields, and the checks between them.

A setting's help text, default and rule are here and nowhere else: `docs/settings.md` and most error messages
are made from the fields below. Names are those of TRL and transformers where the meaning is the same. Knows
nothing about files, YAML or the command line (`load.py` puts the groups together and reads those), nor about
what acts on a setting.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from twig.common.errors import UserError
from twig.common.text import listed
from twig.config.messages import check_budget, check_duration

Text = Annotated[str, Field(min_length=1)]
Index = Annotated[int, Field(ge=0)]


class Frozen(BaseModel):
    # strict: `train.max_steps=true` is a mistake, not 1 step.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class TaskSettings(Frozen):
    """The problems, how the model is asked, and how an answer is rewarded."""

    name: Literal["multiplication", "svamp", "gsm8k", "custom"] = Field(
        description="The task. `custom` is your own data (`task.path`) with your own reward "
        "(`task.reward_file`)."
    )
    path: Text | None = Field(
        None,
        description="Data to read in place of the task's own: a JSON, JSONL or Parquet file, a folder of "
        "them, or (`custom`) a data set on the Hub.",
        examples=["data/train.jsonl"],
    )
    revision: Text | None = Field(
        None, description="Branch, tag or commit of a data set on the Hub.", examples=["main"]
    )
    prompt_template: Text | None = Field(
        None,
        description="Text of the prompt with the columns of a row in braces. null: the task's own.",
        examples=["Question: {question}\nAnswer:"],
    )
    prompt_column: Text = Field("prompt", description="Column that holds the prompt. Used by `custom` only.")
    system_prompt: Text | None = Field(
        None,
        description="Text of the system message. null: the task's own.",
        examples=["Think step by step."],
    )
    chat: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether prompts go through the chat template. `auto`: where the tokenizer has one.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="Passed to the chat template.", examples=["{enable_thinking: false}"]
    )
    train_split: Text | None = Field(
        None, description="Split to train on. null: the task's own.", examples=["train"]
    )
    eval_split: Text | None = Field(
        None, description="Split to evaluate on. null: the task's own.", examples=["test"]
    )
    train_size: int | None = Field(
        None, ge=1, description="Problems to train on. null: all there are.", examples=[1000]
    )
    eval_size: int | None = Field(
        None, ge=1, description="Problems kept for evaluation. null: all.", examples=[1000]
    )
    digits: Annotated[list[Annotated[int, Field(ge=1, le=9)]], Field(min_length=2, max_length=2)] = Field(
        [3, 2], description="Digits of the two factors. Used by `multiplication` only."
    )
    reward_file: str | None = Field(
        None,
        description="Python file and the reward functions in it; each has TRL's signature. null: the "
        "task's own reward.",
        examples=["rewards.py:exact,short"],
    )
    reward_weights: list[float] | None = Field(
        None,
        min_length=1,
        description="Weight of each reward function in the sum. null: 1 each.",
        examples=[[1.0, 0.5]],
    )
    reward_timeout: float | None = Field(
        None,
        gt=0,
        description="Seconds that one call of a reward function may take. null: any.",
        examples=[60],
    )
    reward_on_timeout: float | None = Field(
        None,
        description="The score of every completion of a call that takes longer. null: the run stops.",
        examples=[0.0],
    )
    correct_at: float = Field(
        1.0,
        description="A completion counts as right when its weighted reward reaches this. Used only where "
        "the task cannot tell by itself (`custom`).",
    )

    @model_validator(mode="after")
    def _is_timed(self) -> "TaskSettings":
        if self.reward_on_timeout is not None and self.reward_timeout is None:
            raise UserError(
                "task.reward_on_timeout: nothing times out without task.reward_timeout; write one, such as "
                "task.reward_timeout=60"
            )
        return self

    @field_validator("reward_file")
    @classmethod
    def _names_functions(cls, value: str | None) -> str | None:
        if value is not None:
            file, _, names = value.rpartition(":")
            if not file.endswith(".py") or not all(name.strip().isidentifier() for name in names.split(",")):
                raise UserError(
                    f"task.reward_file: {value!r} does not name a function; write FILE.py:FUNCTION or "
                    "FILE.py:FUNCTION,FUNCTION, such as rewards.py:exact"
                )
        return value


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


S_GRPO_DEFAULTS = {"alpha": 50, "p": 0.3, "k": 100}
# Settings of the group `algorithm` that not every algorithm has, and those that have them.
_EVERY_TOKEN = ("grpo", "dr-grpo", "lambda-grpo", "tempo")
ALGORITHMS_WITH = {
    **dict.fromkeys([*S_GRPO_DEFAULTS, "unbiased"], ("s-grpo",)),
    **dict.fromkeys(["normalise", "l2", "replay"], ("t-spmo",)),
    "beta": ("s-grpo", *_EVERY_TOKEN),
    "scale_rewards": ("grpo", "s-grpo", "lambda-grpo", "tempo"),
    "divisor": ("dr-grpo",),
    "top_entropy_quantile": ("rloo", *_EVERY_TOKEN),
}


class Replay(Frozen):
    """Groups restarted from inside a completion. Used by `t-spmo` only."""

    probability: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Chance that a prompt's next group restarts from inside one of its completions.",
    )
    prefer_correct: float = Field(
        0.5, ge=0, le=1, description="Chance that a right completion is chosen for it."
    )
    cut: Literal["entropy", "uniform"] = Field(
        "entropy",
        description="Where the completion is cut: in proportion to the entropy recorded there, or anywhere.",
    )


class Algorithm(Frozen):
    """Which tokens get credit, and how much."""

    name: Literal["t-spmo", "grpo", "s-grpo", "dr-grpo", "rloo", "lambda-grpo", "tempo"] = Field(
        "t-spmo", description="The algorithm; see docs/algorithms.md."
    )
    scale_rewards: Literal["group", "none"] = Field(
        "group",
        description="`group` divides an advantage by the standard deviation of its group. Used by `grpo`, "
        "`s-grpo`, `lambda-grpo`, `tempo`; `dr-grpo` and `rloo` never divide.",
    )
    beta: float = Field(
        0.0,
        ge=0,
        description="Weight of the KL term to the base model. Used by all but `t-spmo` and `rloo`.",
    )
    use_bias_correction_kl: bool = Field(
        True,
        description="Multiply the KL term by the probability ratio, as TRL does. Used where beta is above 0.",
    )
    epsilon: float = Field(
        0.2, ge=0, le=1, description="The ratio is clipped below at 1 - epsilon (`num_iterations` > 1)."
    )
    epsilon_high: float | None = Field(
        None,
        ge=0,
        description="The ratio is clipped above at 1 + epsilon_high. null: epsilon.",
        examples=[0.28],
    )
    num_iterations: int = Field(1, ge=1, description="Optimizer steps on each sampled batch.")
    mask_truncated_completions: bool = Field(
        False, description="Give no credit to completions that were cut off at max_completion_length."
    )
    alpha: int | None = Field(
        None,
        ge=0,
        description="The first alpha tokens are always trained. null: 50. Used by `s-grpo` only.",
        examples=[50],
    )
    p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Chance that a later token is trained. null: 0.3. Used by `s-grpo` only.",
        examples=[0.3],
    )
    k: int | None = Field(
        None,
        ge=1,
        description="Most tokens trained per completion. null: 100. Used by `s-grpo` only.",
        examples=[100],
    )
    unbiased: bool = Field(
        False,
        description="Draw the later tokens so that the expected gradient is that of `grpo`. Used by "
        "`s-grpo` only.",
    )
    divisor: int | None = Field(
        None,
        ge=1,
        description="What a completion's sum over its tokens is divided by in place of its length. null: "
        "rollout.max_completion_length. Used by `dr-grpo` only.",
        examples=[256],
    )
    top_entropy_quantile: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Only this share of a step's tokens, those sampled with the highest entropy, is pushed "
        "up or down. 1: all. Used by `grpo`, `dr-grpo`, `rloo`, `lambda-grpo`, `tempo`.",
        examples=[0.2],
    )
    normalise: Literal["unique", "branches"] = Field(
        "unique",
        description="Divide by all unique nodes of a group, or by those with credit only. Used by "
        "`t-spmo` only.",
    )
    l2: float = Field(
        0.0,
        ge=0,
        description="Lambda, the weight of the adapter's squared L2 norm (decoupled). Used by `t-spmo` only.",
    )
    replay: Replay = Field(default_factory=Replay, description="Groups restarted from inside a completion.")

    @model_validator(mode="after")
    def _one_algorithm(self) -> "Algorithm":
        if self.name == "s-grpo":
            for key, value in S_GRPO_DEFAULTS.items():
                _resolve(self, key, value)
            if self.unbiased and self.k <= self.alpha:
                raise UserError(
                    f"algorithm.k: {self.k} is not above algorithm.alpha={self.alpha}, "
                    "as algorithm.unbiased needs; "
                    f"write algorithm.k={self.alpha + 50} or a smaller algorithm.alpha"
                )
        unset = {**dict.fromkeys([*S_GRPO_DEFAULTS, "divisor"], "null"), "unbiased": "false"}
        unset |= {"normalise": "unique", "top_entropy_quantile": "1", "replay": "0"}
        unset |= {"l2": "0 (and algorithm.beta to stay near the base)"}
        unset |= {"beta": "0 (and algorithm.l2 to stay near the base)" if self.name == "t-spmo" else "0"}
        for key, instead in unset.items():
            self._refuse(key, instead)
        if self.name == "t-spmo":
            self._refuse("scale_rewards", "group")
        if self.name == "rloo" and self.num_iterations > 1:
            raise UserError(
                "algorithm.num_iterations: algorithm.name=rloo takes one step on a batch, as its ratio is "
                "that of the whole completion; write algorithm.num_iterations=1"
            )
        _resolve(self, "epsilon_high", self.epsilon)
        return self

    def _refuse(self, key: str, instead: str) -> None:
        """Raises UserError where `key`, which this algorithm does not have, is set."""
        value, users = getattr(self, key), ALGORITHMS_WITH[key]
        if key == "replay":
            key, value, default = "replay.probability", value.probability, 0.0
        else:
            default = type(self).model_fields[key].default
        if self.name not in users and value != default:
            raise UserError(
                f"algorithm.{key}: not used by algorithm.name={self.name}, only by {listed(users)}; "
                f"write algorithm.{key}={instead}"
            )


def _resolve(group: Frozen, key: str, value: Any) -> None:
    # The one write into a frozen group: null becomes what it stands for, while the group is being built.
    if getattr(group, key) is None:
        object.__setattr__(group, key, value)
