"""The tables of Compare: candidates and cards, suites, runs, judges, verdicts, votes, promotions and the weekly digest.

What holds text of prompts or answers (prompts, outputs, check_results, judgements) is sealed under the suite's key and goes with
the suite; a suite that was made of a file goes with the file, in the transaction that deletes it. Figures and verdicts stay.
Columns that hold JSON are Text. Times are microseconds.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    UniqueConstraint,
)

from ropewalk.database import metadata

# -- what is compared

candidates = Table(
    "candidates",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workspace_id", Text, ForeignKey("workspaces.id"), nullable=False),
    Column("user_id", Text),
    Column("kind", Text, nullable=False),  # base, adapter, alias, remote, card
    Column("name", Text, nullable=False),
    Column("target", Text, nullable=False),  # the name it is served by; empty for a card
    Column("digest", Text, nullable=False),  # of the weights as they were when it was added
    Column("family", Text, nullable=False),
    Column("template_digest", Text, nullable=False),
    Column("linked_to", Text),  # of a card: the candidate that can be run
    Column("created_at", BigInteger, nullable=False),
    Index("candidates_workspace_created", "workspace_id", "created_at", "id"),
)

lineage = Table(  # where a candidate's weights come from
    "candidate_lineage",
    metadata,
    Column("candidate_id", Text, ForeignKey("candidates.id", ondelete="CASCADE"), primary_key=True),
    Column("role", Text, primary_key=True),  # train_data, data_generator, reward_model, teacher
    Column("ref", Text, primary_key=True),  # a file's id, a path, or the name of a model
    Column("share", Float),  # of the training data
)

cards = Table(
    "cards",
    metadata,
    Column("candidate_id", Text, ForeignKey("candidates.id", ondelete="CASCADE"), primary_key=True),
    Column("content", Text, nullable=False),  # the card, less its claims
    Column("text_digest", Text, nullable=False),  # of the page's text
    Column("imported_at", BigInteger, nullable=False),
)

claims = Table(
    "claims",
    metadata,
    Column("id", Text, primary_key=True),
    Column("candidate_id", Text, ForeignKey("candidates.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),  # its place on the card
    Column("content", Text, nullable=False),  # the claim as the page has it
    Column("metric", Text, nullable=False),
    Column("status", Text, nullable=False),  # untested, confirmed, contradicted
    Column("measurement_id", Text, ForeignKey("measurements.id")),
    Column("low", Float),  # what was measured, in the claim's unit
    Column("high", Float),
    Column("tested_at", BigInteger),
    UniqueConstraint("candidate_id", "number"),
)

# -- on what

suites = Table(
    "suites",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workspace_id", Text, ForeignKey("workspaces.id"), nullable=False),
    Column("user_id", Text),
    Column("name", Text, nullable=False),
    Column("made_as", Text, nullable=False),  # "suite": with file_id and id the key of a row of `derived`
    Column("file_id", Text),  # null: not made of a file
    Column("sealed_key", LargeBinary, nullable=False),  # seals texts; wrapped by the workspace's key
    Column("complete", Boolean, nullable=False),  # whether all prompts are written down; before that nobody sees it
    Column("digest", Text, nullable=False),  # of what it was made of
    Column("n_prompts", Integer, nullable=False),
    Column("n_held", Integer, nullable=False),
    Column("n_groups", Integer, nullable=False),
    Column("hold", Float, nullable=False),
    Column("margin", Float, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    ForeignKeyConstraint(
        ["file_id", "made_as", "id"],
        ["derived.owner", "derived.kind", "derived.name"],
        ondelete="CASCADE",
        name="suites_made_of",
    ),
    Index("suites_workspace_created", "workspace_id", "created_at", "id"),
    Index("suites_file", "file_id", "made_as", "id"),
)

prompts = Table(
    "prompts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("suite_id", Text, ForeignKey("suites.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),  # from 1, as they came
    Column("held", Boolean, nullable=False),
    Column("must_pass", Boolean, nullable=False),
    Column("text_hash", Text, nullable=False),  # of what is asked, under the suite's key
    Column("content", LargeBinary, nullable=False),  # sealed: messages, reference, group, tags, checks
    UniqueConstraint("suite_id", "number"),
)

leakages = Table(  # which prompts stand in a training file, so that it is looked through once
    "leakages",
    metadata,
    Column("suite_id", Text, ForeignKey("suites.id", ondelete="CASCADE"), primary_key=True),
    Column("file", Text, primary_key=True),  # an id, or a path
    Column("stamp", Text, nullable=False),  # of the rule, and of the file where it can change
    Column("numbers", Text, nullable=False),  # of the prompts
    Column("created_at", BigInteger, nullable=False),
)

# -- what was asked and answered

fingerprints = Table(  # of a machine and its software
    "fingerprints",
    metadata,
    Column("id", Text, primary_key=True),  # the digest of all that follows
    Column("device", Text, nullable=False),
    Column("driver", Text, nullable=False),
    Column("versions", Text, nullable=False),
    Column("dtype", Text, nullable=False),
    Column("commit", Text, nullable=False),
    Column("detail", Text, nullable=False),  # whatever else is in the digest
    Column("created_at", BigInteger, nullable=False),
)

runs = Table(
    "runs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workspace_id", Text, ForeignKey("workspaces.id"), nullable=False),
    Column("candidate_id", Text, ForeignKey("candidates.id"), nullable=False),
    Column("suite_id", Text, nullable=False),  # which may be gone
    Column("params", Text, nullable=False),  # sampling
    Column("seed", BigInteger),
    Column("path", Text, nullable=False),  # serving, batch
    Column("digest", Text, nullable=False),  # of the candidate as it ran
    Column("fingerprint_id", Text, ForeignKey("fingerprints.id")),
    Column("state", Text, nullable=False),  # new, running, done, failed
    Column("error", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Index("runs_candidate", "candidate_id", "created_at"),
    Index("runs_suite", "suite_id"),
)

outputs = Table(
    "outputs",
    metadata,
    Column("id", Text, primary_key=True),
    Column("run_id", Text, ForeignKey("runs.id", ondelete="CASCADE"), nullable=False),
    Column("suite_id", Text, ForeignKey("suites.id", ondelete="CASCADE"), nullable=False),
    Column("prompt_id", Text, ForeignKey("prompts.id", ondelete="CASCADE"), nullable=False),
    Column("sample", Integer, nullable=False),
    Column("key", Text, nullable=False),  # the hash of candidate, prompt and sampling: what was answered is not asked again
    Column("content", LargeBinary),  # sealed text; null where an error came
    Column("text_hash", Text),  # under the suite's key
    Column("finish", Text),
    Column("tokens_in", Integer, nullable=False),
    Column("tokens_cached", Integer, nullable=False),
    Column("tokens_out", Integer, nullable=False),
    Column("ttft_ms", Float),
    Column("total_ms", Float),
    Column("retries", Integer, nullable=False),
    Column("error", Text),
    Column("cached_from", Text),  # the output that this one repeats; its times are that one's
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("run_id", "prompt_id", "sample"),
    Index("outputs_suite_key", "suite_id", "key"),
    Index("outputs_prompt", "prompt_id"),
)

check_results = Table(
    "check_results",
    metadata,
    Column("output_id", Text, ForeignKey("outputs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),  # of the check among the prompt's
    Column("kind", Text, nullable=False),
    Column("guardrail", Boolean, nullable=False),
    Column("passed", Boolean, nullable=False),
    Column("detail", LargeBinary, nullable=False),  # sealed
)

measurements = Table(
    "measurements",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workspace_id", Text, ForeignKey("workspaces.id"), nullable=False),
    Column("run_id", Text, ForeignKey("runs.id")),  # null: a bench job of its own
    Column("candidate_id", Text, ForeignKey("candidates.id"), nullable=False),
    Column("metric", Text, nullable=False),
    Column("value", Float, nullable=False),
    Column("low", Float),
    Column("high", Float),
    Column("n", Integer, nullable=False),
    Column("unit", Text, nullable=False),
    Column("concurrency", Integer, nullable=False),
    Column("fingerprint_id", Text, ForeignKey("fingerprints.id"), nullable=False),
    Column("detail", Text, nullable=False),  # what else is to be told
    Column("created_at", BigInteger, nullable=False),
    Index("measurements_run", "run_id"),
    Index("measurements_candidate", "candidate_id", "created_at"),
)

prices = Table(
    "candidate_prices",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workspace_id", Text, ForeignKey("workspaces.id"), nullable=False),
    Column("target", Text, nullable=False),  # a served name; empty: an hour of this machine
    Column("unit", Text, nullable=False),  # input token, cached token, output token, hour
    Column("usd", Float, nullable=False),
    Column("valid_from", Text, nullable=False),  # UTC, as 2026-11-22
    Column("source", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("workspace_id", "target", "unit", "valid_from"),
)

# -- comparisons, their judges and verdicts

comparisons = Table(
    "comparisons",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workspace_id", Text, ForeignKey("workspaces.id"), nullable=False),
    Column("user_id", Text),
    Column("title", Text, nullable=False),
    Column("category", Text, nullable=False),
    Column("suite_id", Text),  # null: cards alone; it may be gone
    Column("baseline_id", Text, ForeignKey("candidates.id"), nullable=False),
    Column("rule_version", Text, nullable=False),
    Column("plan", Text, nullable=False),
    Column("state", Text, nullable=False),  # new, running, done, failed
    Column("error", Text),
    Column("holder", Text),  # the process that runs it ...
    Column("lease_until", BigInteger, nullable=False),  # ... and is believed alive until then
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Index("comparisons_workspace_created", "workspace_id", "created_at", "id"),
    Index("comparisons_state", "state"),
)

comparison_items = Table(  # the candidates of a comparison; number 0 is the baseline
    "comparison_items",
    metadata,
    Column("comparison_id", Text, ForeignKey("comparisons.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("candidate_id", Text, ForeignKey("candidates.id"), nullable=False),
    Column("run_id", Text, ForeignKey("runs.id")),
    Column("chosen_from", Integer, nullable=False),  # checkpoints that were tried
    UniqueConstraint("comparison_id", "candidate_id"),
    Index("comparison_items_candidate", "candidate_id"),
)

judges = Table(
    "judges",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workspace_id", Text, ForeignKey("workspaces.id"), nullable=False),
    Column("comparison_id", Text, ForeignKey("comparisons.id", ondelete="CASCADE")),
    Column("candidate_id", Text, ForeignKey("candidates.id"), nullable=False),
    Column("prompt_digest", Text, nullable=False),  # of the words it is asked with
    Column("family", Text, nullable=False),
    Column("admitted", Boolean),  # null: not tried yet
    Column("calibrated", Boolean, nullable=False),
    Column("agreement", Float),
    Column("agreement_longest", Float),
    Column("flip_rate", Float),
    Column("n_labels", Integer, nullable=False),
    Column("sentence", Text),  # why it was admitted, or not
    Column("refused_reason", Text),
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("comparison_id", "candidate_id"),
)

judgements = Table(
    "judgements",
    metadata,
    Column("id", Text, primary_key=True),
    Column("comparison_id", Text, ForeignKey("comparisons.id", ondelete="CASCADE"), nullable=False),
    Column("suite_id", Text, ForeignKey("suites.id", ondelete="CASCADE"), nullable=False),
    Column("prompt_id", Text, ForeignKey("prompts.id", ondelete="CASCADE"), nullable=False),
    Column("judge_id", Text, ForeignKey("judges.id", ondelete="CASCADE"), nullable=False),
    Column("candidate_id", Text, ForeignKey("candidates.id"), nullable=False),  # the one that is held against the baseline
    Column("left_output", Text, ForeignKey("outputs.id", ondelete="CASCADE"), nullable=False),
    Column("right_output", Text, ForeignKey("outputs.id", ondelete="CASCADE"), nullable=False),
    Column("order", Text, nullable=False),  # AB: the baseline's answer stood first
    Column("score", Float),  # for the candidate: 0, 0.5, 1; null where an error came
    Column("reason", LargeBinary),  # sealed
    Column("key", Text, nullable=False),  # the hash of judge, words and answers
    Column("tokens_in", Integer, nullable=False),
    Column("tokens_out", Integer, nullable=False),
    Column("cost", Float),
    Column("error", Text),
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("comparison_id", "judge_id", "left_output", "right_output"),
    Index("judgements_suite_key", "suite_id", "key"),
    Index("judgements_prompt", "prompt_id"),
    Index("judgements_left", "left_output"),
    Index("judgements_right", "right_output"),
    Index("judgements_judge", "judge_id"),
)

verdicts = Table(  # added to, and never changed
    "verdicts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("comparison_id", Text, ForeignKey("comparisons.id"), nullable=False),
    Column("candidate_id", Text, ForeignKey("candidates.id"), nullable=False),
    Column("edition", Integer, nullable=False),  # of the comparison's verdicts, from 1
    Column("state", Text, nullable=False),
    Column("effect", Float),
    Column("low", Float),
    Column("high", Float),
    Column("content", Text, nullable=False),  # the verdict whole
    Column("inputs_digest", Text, nullable=False),  # of the evidence it was decided from
    Column("rule_version", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("comparison_id", "edition", "candidate_id"),
    Index("verdicts_candidate", "candidate_id", "created_at"),
)

takes = Table(  # of the panel: opinion
    "takes",
    metadata,
    Column("id", Text, primary_key=True),
    Column("comparison_id", Text, ForeignKey("comparisons.id", ondelete="CASCADE"), nullable=False),
    Column("candidate_id", Text, ForeignKey("candidates.id"), nullable=False),
    Column("edition", Integer, nullable=False),  # the verdicts' that it goes with
    Column("persona", Text, nullable=False),
    Column("score", Float),
    Column("stance", Text),
    Column("text", Text, nullable=False),
    Column("cited", Text, nullable=False),
    Column("model", Text),  # whose words they are, where not the formula's own
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("comparison_id", "edition", "candidate_id", "persona"),
)

# -- people's votes

voters = Table(
    "voters",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workspace_id", Text, ForeignKey("workspaces.id"), nullable=False),
    Column(
        "identity_hash", LargeBinary, nullable=False
    ),  # of the user, the key or the browser, under a key of the installation
    Column("trainer_of", Text, nullable=False),  # candidates
    Column("self_consistency", Float),
    Column("excluded_reason", Text),
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("workspace_id", "identity_hash"),
)

vote_tickets = Table(
    "vote_tickets",
    metadata,
    Column("token_hash", LargeBinary, primary_key=True),
    Column("voter_id", Text, ForeignKey("voters.id"), nullable=False),
    Column("comparison_id", Text, ForeignKey("comparisons.id", ondelete="CASCADE"), nullable=False),
    Column("prompt_id", Text, ForeignKey("prompts.id", ondelete="CASCADE"), nullable=False),
    Column("left_output", Text, ForeignKey("outputs.id", ondelete="CASCADE"), nullable=False),
    Column("right_output", Text, ForeignKey("outputs.id", ondelete="CASCADE"), nullable=False),
    Column("left_candidate", Text, ForeignKey("candidates.id"), nullable=False),
    Column("right_candidate", Text, ForeignKey("candidates.id"), nullable=False),
    Column("is_repeat", Boolean, nullable=False),
    Column("issued_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("used_at", BigInteger),
    UniqueConstraint("voter_id", "left_output", "right_output"),
    Index("vote_tickets_comparison", "comparison_id"),
    Index("vote_tickets_prompt", "prompt_id"),
    Index("vote_tickets_left", "left_output"),
    Index("vote_tickets_right", "right_output"),
)

votes = Table(  # a chain of its own for each comparison; added to, and never changed
    "votes",
    metadata,
    Column("id", Text, primary_key=True),
    Column("comparison_id", Text, ForeignKey("comparisons.id"), nullable=False),
    Column("number", Integer, nullable=False),  # from 1
    Column("ticket", LargeBinary, nullable=False, unique=True),  # its hash; the ticket goes with the suite
    Column("voter_id", Text, ForeignKey("voters.id"), nullable=False),
    Column("prompt_id", Text, nullable=False),
    Column("left_candidate", Text, nullable=False),
    Column("right_candidate", Text, nullable=False),
    Column("choice", Text, nullable=False),  # left, right, same, both_bad
    Column("ms", BigInteger, nullable=False),
    Column("is_repeat", Boolean, nullable=False),
    Column("previous", Text, nullable=False),
    Column("hash", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("comparison_id", "number"),
    Index("votes_voter", "voter_id"),
)

labels = Table(  # people's preferences that judges are held against
    "labels",
    metadata,
    Column("id", Text, primary_key=True),
    Column("comparison_id", Text, ForeignKey("comparisons.id", ondelete="CASCADE"), nullable=False),
    Column("suite_id", Text, ForeignKey("suites.id", ondelete="CASCADE"), nullable=False),
    Column("prompt_id", Text, ForeignKey("prompts.id", ondelete="CASCADE"), nullable=False),
    Column("left_output", Text, ForeignKey("outputs.id", ondelete="CASCADE"), nullable=False),
    Column("right_output", Text, ForeignKey("outputs.id", ondelete="CASCADE"), nullable=False),
    Column("voter_id", Text, ForeignKey("voters.id")),
    Column("value", Float, nullable=False),  # for the right one: 0, 0.5, 1
    Column("source", Text, nullable=False),  # vote, file
    Column("created_at", BigInteger, nullable=False),
    Index("labels_comparison", "comparison_id"),
    Index("labels_suite", "suite_id"),
    Index("labels_prompt", "prompt_id"),
    Index("labels_left", "left_output"),
    Index("labels_right", "right_output"),
)

# -- what is served on which verdict

promotions = Table(
    "promotions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workspace_id", Text, ForeignKey("workspaces.id"), nullable=False),
    Column("alias", Text, nullable=False),
    Column("from_name", Text),  # null: it pointed at nothing
    Column("to_name", Text, nullable=False),
    Column("to_digest", Text, nullable=False),
    Column("comparison_id", Text, ForeignKey("comparisons.id")),
    Column("candidate_id", Text, ForeignKey("candidates.id")),
    Column("verdict_id", Text, ForeignKey("verdicts.id")),
    Column("rule_version", Text, nullable=False),
    Column("by", Text, nullable=False),  # the key, the user, or the command line
    Column("override_reason", Text),
    Column("replay", Text, nullable=False),  # how many recorded prompts were asked again, and what came
    Column("created_at", BigInteger, nullable=False),
    Column("rolled_back_at", BigInteger),
    Column("rolled_back_by", Text),
    Index("promotions_alias", "alias", "created_at"),
    Index("promotions_workspace_created", "workspace_id", "created_at"),
)

# -- what people keep in sight

bookmarks = Table(
    "bookmarks",
    metadata,
    Column("workspace_id", Text, ForeignKey("workspaces.id"), primary_key=True),
    Column("owner", Text, primary_key=True),  # a user, or the key of a browser's cookie
    Column("target", Text, primary_key=True),  # a comparison's id or a candidate's
    Column("created_at", BigInteger, nullable=False),
)

subscribers = Table(
    "subscribers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workspace_id", Text, ForeignKey("workspaces.id"), nullable=False),
    Column("user_id", Text),  # whose comparisons it is told of; null: the workspace's
    Column("identity_hash", LargeBinary),  # as a voter's: what still waits for this one's vote
    Column("mail_hash", LargeBinary, nullable=False),  # under a key of the installation
    Column("sealed_mail", LargeBinary),  # under the workspace's key; null once gone
    Column("state", Text, nullable=False),  # pending, active, gone
    Column("confirm_hash", LargeBinary, unique=True),
    Column("leave_hash", LargeBinary, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("confirmed_at", BigInteger),
    Column("gone_at", BigInteger),
    UniqueConstraint("workspace_id", "mail_hash"),
)

digests = Table(
    "digests",
    metadata,
    Column("id", Text, primary_key=True),
    Column("workspace_id", Text, ForeignKey("workspaces.id"), nullable=False),
    Column("week", Text, nullable=False),  # ISO, as 2026-W47
    Column("since", BigInteger, nullable=False),
    Column("until", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("sent_at", BigInteger),
    Column("holder", Text),  # the process that sends it ...
    Column("lease_until", BigInteger, nullable=False),  # ... and is believed alive until then
    UniqueConstraint("workspace_id", "week"),
)

digest_items = Table(
    "digest_items",
    metadata,
    Column("digest_id", Text, ForeignKey("digests.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("ref", Text, nullable=False),
    Column("content", Text, nullable=False),
)

digest_sendings = Table(  # so that nobody gets one twice
    "digest_sendings",
    metadata,
    Column("digest_id", Text, ForeignKey("digests.id", ondelete="CASCADE"), primary_key=True),
    Column("subscriber_id", Text, ForeignKey("subscribers.id", ondelete="CASCADE"), primary_key=True),
    Column("state", Text, nullable=False),  # claimed (perhaps sent), sent, failed (to be tried again), refused, nothing
    Column("tries", Integer, nullable=False),
    Column("error", Text),
    Column("at", BigInteger, nullable=False),
)
