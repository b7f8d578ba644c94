"""The group of settings `task`, and what every group is made of; `settings.py` has the others."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from twig.records import UserError

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
