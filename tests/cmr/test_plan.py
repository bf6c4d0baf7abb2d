"""What resolve refuses, by name and before weights are read, and what explain says of the rest."""

import numpy as np
import pytest
from tests.toy import MODEL, PROMPT, Copies, Sees, answer, run

from cmr import AttnRule, LayerCache, PluginError, Session, hookimpl, plugin
from cmr.deltanet import DeltaNet
from cmr.plan import explain
from cmr.state import DeltaState
from cmr.testing import ToyModel


def owner(**hooks):
    """A plugin class called Mine with these hooks, each a function of any arguments or an answer."""
    made = {}
    for name, answer_ in hooks.items():
        function = answer_ if callable(answer_) else (lambda self, given=answer_: given)
        made[name] = hookimpl(function)
    return type("Mine", (), {"on": True, **made})


class Untouchable(ToyModel):
    """A model whose weights must not be read."""

    def __init__(self):
        super().__init__()
        self.weights = self

    def acquire(self, layer):
        raise AssertionError("a weight was read")

    release = acquire


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (owner(weight_source=3), "mine returned 3 from weight_source, which has no acquire and no release"),
        (
            owner(layer_order=[0, 7]),
            r"mine returned \[0, 7\] from layer_order; it returns layers of 0 to 2, each once",
        ),
        (owner(layer_order=[0, 0]), "each once"),
        (owner(layer_order="ab"), "each once"),
        (
            owner(kv_cache=5),
            "mine returned 5 from kv_cache for layer 0; it returns a function without arguments",
        ),
        (owner(kv_cache=lambda self: dict), r"mine returned \{\} from kv_cache, which has no append"),
        (owner(kv_cache=lambda self: LayerCache), "mine: the cache of layer 0 cannot be made: TypeError"),
        (owner(attention="all"), "mine returned 'all' from attention for layer 0; it returns an AttnRule or"),
        (
            owner(attention=AttnRule(sink_logits=[1.0] * 4)),
            "mine returned a rule with sink_logits that are no",
        ),
        (owner(attention=AttnRule(sink_logits=np.ones(4))), "no contiguous array of float32"),
        (
            owner(attention=AttnRule(sink_logits=np.ones(8, np.float32)[::2])),
            "no contiguous array of float32",
        ),
        (
            owner(attention=AttnRule(sink_logits=np.ones(3, np.float32))),
            r"mine returned a rule with sink_logits \[3\]; \[4\] is needed",
        ),
        (
            owner(attention=lambda self: lambda query: 0),
            "mine: attend has no argument 'query'; there are: q, cache",
        ),
        (owner(drafter=7), "mine returned 7 from drafter, which has no propose"),
        (owner(scheduler=7), "mine returned 7 from scheduler, which has no add and no pick and no remove"),
        (owner(kv_cache=lambda self: 1 / 0), "mine failed in <lambda>: ZeroDivisionError: division by zero"),
    ],
)
def test_wrong_answers_name_the_plugin_and_what_is_wanted(cls, message):
    with pytest.raises(PluginError, match=message):
        Session.open(Untouchable(), [cls()])


def test_two_owners_are_both_named_in_the_order_given():
    class Other:
        @hookimpl
        def drafter(self):
            return self

        def propose(self, seq):
            return []

    with pytest.raises(PluginError, match="copies and other both provide drafter; choose one"):
        Session.open(Untouchable(), [Copies(), Other()])


@pytest.mark.parametrize("conflicts", [("sees",), {"sees": "both look"}])
def test_conflicts_are_refused_by_name(conflicts):
    cls = owner(on_step=lambda self: None)
    cls.conflicts = conflicts
    reason = ": both look" if isinstance(conflicts, dict) else ""
    for order in ([cls(), Sees()], [Sees(), cls()]):
        with pytest.raises(PluginError, match=f"^mine and sees cannot run together{reason}$"):
            Session.open(Untouchable(), order)


def test_a_device_that_a_plugin_does_not_know_is_refused():
    cls = owner(on_step=lambda self: None)
    cls.devices = ("cuda", "metal")
    with pytest.raises(PluginError, match="mine works on cuda and metal, and this model runs on portable"):
        Session.open(Untouchable(), [cls()])


def test_what_a_plugin_needs_of_the_model_must_be_there():
    cls = owner(on_step=lambda self: None)
    cls.needs = ("tokenizer",)
    Session.open(Untouchable(), [cls()])
    cls.needs = ("chat_template",)
    with pytest.raises(PluginError, match="mine needs a chat template, and this model has none"):
        Session.open(Untouchable(), [cls()])
    cls.needs = ("a pony",)
    with pytest.raises(
        PluginError, match="mine declares a need for 'a pony'; there are: tokenizer, chat_template"
    ):
        Session.open(Untouchable(), [cls()])


def mixed(*kinds):
    """A model of layers of these kinds."""
    model = Untouchable()
    model.config.layer_kinds = kinds
    model.config.delta = DeltaNet(1, 2, 4, 4, 3)
    return model


def test_plugins_are_not_asked_for_layers_of_a_kind_that_they_do_not_serve():
    asked = []

    def caches(self, model, layer):
        asked.append(layer)
        return LayerCache.factory(model, layer)

    model = mixed("attention", "recurrent", "attention")
    plan = Session.open(model, [owner(kv_cache=caches)()]).plan
    assert asked == [0, 2] and plan.kv_layers == (0, 2)
    assert plan.owners["kv_cache"] == ("mine", "built in", "mine")
    assert "kv_cache       0 mine; 1 built in; 2 mine" in list(explain(plan))
    state = plan.caches[1]()
    assert isinstance(state, DeltaState) and plan.memory.state == state.bytes_at(1)
    assert plan.memory.kv == plan.memory.kv_token * plan.memory.context + plan.memory.state
    assert any(f"{plan.memory.state} B of it states" in line for line in explain(plan))


def test_a_plugin_with_no_layer_of_its_kind_is_refused():
    serves = owner(kv_cache=lambda self, model, layer: None)
    serves.layer_kinds = ("recurrent",)
    with pytest.raises(
        PluginError, match=r"mine serves recurrent layers \(kv_cache\), and those of this model"
    ):
        Session.open(Untouchable(), [serves()])


def test_a_plugin_may_serve_recurrent_layers():
    class Halves(DeltaState):
        pass

    serves = owner(kv_cache=lambda self, model, layer: Halves.factory(model, layer))
    serves.layer_kinds = ("recurrent",)
    plan = Session.open(mixed("attention", "recurrent", "attention"), [serves()]).plan
    assert plan.owners["kv_cache"] == ("built in", "mine", "built in")
    serves = owner(kv_cache=lambda self, model, layer: list)
    serves.layer_kinds = ("recurrent",)
    with pytest.raises(PluginError, match="which has no take and no rollback and no snapshot and no restore"):
        Session.open(mixed("attention", "recurrent", "attention"), [serves()])


def test_drafters_and_evidence_meet_recurrent_layers():
    class Drafts:
        def propose(self, seq):
            return []

    drafts = owner(drafter=lambda self: Drafts())
    model = mixed("attention", "recurrent", "attention")
    with pytest.raises(PluginError, match="the state of layer 1, which is recurrent, cannot"):
        Session.open(model, [drafts()])
    policy = owner(on_step=lambda self: None)
    policy.evidence = ("window-weights",)
    plan = Session.open(model, [policy()]).plan
    assert plan.caches[0]().noted is not None and isinstance(plan.caches[1](), DeltaState)


def test_evidence_must_be_given_by_the_cache_of_every_layer():
    class Fused(LayerCache):
        def attend(self, q, q_pos, rule, out, prompt):
            out[:] = 0

    class Weighs(Fused):
        evidence = ("window-weights",)

        def note(self, kind):
            self.kind = kind

    policy = owner(on_step=lambda self: None)
    policy.evidence = ("window-weights",)
    giver = owner(kv_cache=lambda self, model, layer: Weighs.factory(model, layer))
    both = type("Both", (giver,), {"evidence": ("window-weights",)})
    plan = Session.open(Untouchable(), [both()]).plan
    assert plan.evidence == {"window-weights"} and plan.caches[0]().kind == "window-weights"
    other = type("Other", (owner(kv_cache=lambda self, model, layer: Fused.factory(model, layer)),), {})
    with pytest.raises(
        PluginError, match=r"mine needs window-weights from attention, and the cache of layer 0 \(other"
    ):
        Session.open(Untouchable(), [policy(), other()])


def test_drafts_need_caches_that_roll_back():
    class Forward(LayerCache):
        can_rollback = False

    caches = owner(kv_cache=lambda self, model, layer: Forward.factory(model, layer))
    with pytest.raises(
        PluginError, match=r"copies needs to roll caches back, and that of layer 0 \(mine\) cannot"
    ):
        Session.open(Untouchable(), [caches(), Copies()])


def test_a_rule_keeps_what_it_does_not_say_from_the_model():
    class Capped(ToyModel):
        def rule(self, layer):
            return AttnRule(window=9, softcap=30.0, scale=0.5)

    class Keeps:
        @hookimpl
        def attention(self):
            return AttnRule(window=4, sinks=2)

    plan = Session.open(Capped(), [Keeps()]).plan
    assert {attend.__self__ for attend in plan.attend} == {AttnRule(4, 2, 30.0, 0.5)}
    plan = Session.open(Capped()).plan
    assert {attend.__self__ for attend in plan.attend} == {AttnRule(9, 0, 30.0, 0.5)}


def test_a_rule_keeps_the_logits_of_no_slot_unless_it_has_its_own():
    logits, none = np.arange(4, dtype=np.float32), np.full(4, -np.inf, np.float32)

    class Sinking(ToyModel):
        def rule(self, layer):
            return AttnRule(sink_logits=logits)

    for given, wanted in ((None, logits), (none, none)):
        plan = Session.open(Sinking(), [owner(attention=AttnRule(window=4, sink_logits=given))()]).plan
        assert all(attend.__self__.sink_logits is wanted for attend in plan.attend)


# -- failures while it runs: the message names the plugin, the session goes on --


def fails():
    raise LookupError("nothing there")


RUNTIME = {
    "on_attention": (
        lambda self, seq: self.on and fails(),
        "mine failed in <lambda>: LookupError: nothing there",
    ),
    "on_layer": (lambda self, step: self.on and fails(), "mine failed"),
    "on_logits": (lambda self, logits: self.on and logits[:, 3.5], "mine failed in <lambda>: IndexError"),
    "on_token": (
        lambda self: True if self.on else None,
        "mine returned True from on_token; it returns a reason",
    ),
    "on_step": (lambda self, step: self.on and fails(), "mine failed"),
    "restore_prefix": (
        lambda self: 52 if self.on else None,
        "mine returned 52 from restore_prefix; it returns how",
    ),
    "answer_request": (
        lambda self: ["a"] if self.on else None,
        r"mine returned \['a'\] from answer_request; it ret",
    ),
    "prepare_request": (lambda self: self.on and fails(), "mine failed"),
    "store_prefix": (lambda self, seq: self.on and fails(), "mine failed"),
    "finish_request": (lambda self, request: self.on and fails(), "mine failed"),
}


@pytest.mark.parametrize("hook", RUNTIME)
def test_a_failure_in_a_hook_names_the_plugin_and_spares_the_next_request(hook):
    function, message = RUNTIME[hook]
    broken = owner(**{hook: function})()
    session = Session.open(MODEL, [broken])
    with pytest.raises(PluginError, match=message):
        answer(session)
    assert not session.loop.running
    broken.on = False
    assert answer(session) == run()


def test_a_drafter_that_fails_or_returns_junk():
    for junk, message in [
        (lambda seq: fails(), "mine failed in propose: LookupError: nothing there"),
        (lambda seq: None, "mine: propose returned None; it returns token ids of 0 to 95"),
        (lambda seq: [5000], r"mine: propose returned \[5000\]"),
        (lambda seq: [1, 0.5], "mine: propose returned"),
        (lambda seq: "ab", "mine: propose returned 'ab'"),
    ]:

        class Mine:
            on = True

            @hookimpl
            def drafter(self):
                return self

            def propose(self, seq, junk=junk):
                return junk(seq) if self.on else []

        made = Mine()
        session = Session.open(MODEL, [made])
        with pytest.raises(PluginError, match=message):
            answer(session)
        made.on = False
        assert answer(session) == run()


def test_a_drafter_that_never_drafts_costs_nothing():
    class Mine:
        @hookimpl
        def drafter(self):
            return self

        def propose(self, seq):
            return ()

    assert run(Mine()) == run()


@pytest.mark.parametrize(
    ("attend", "message"),
    [
        (
            lambda q, cache, q_pos: q[:, :1],
            r"mine: attend of layer 0 returned an array \[52, 1, 8\]; floats \[52, 4, 8\]",
        ),
        (lambda q: None, "mine: attend of layer 0 returned None"),
        (lambda q: q.astype(complex), "mine: attend of layer 0 returned an array"),
        (lambda q: 1 / 0, "mine failed in <lambda>: ZeroDivisionError"),
    ],
)
def test_attention_of_the_wrong_shape(attend, message):
    session = Session.open(MODEL, [owner(attention=lambda self, given=attend: given)()])
    with pytest.raises(PluginError, match=message):
        answer(session)


def test_a_cache_that_fails():
    class Mine:
        on = True

        @hookimpl
        def kv_cache(self, model, layer):
            plugin_ = self

            class Fragile(LayerCache):
                def append(self, k, v, pos):
                    if plugin_.on and len(self) > 60:
                        raise MemoryError("no room")
                    super().append(k, v, pos)

            return Fragile.factory(model, layer)

    made = Mine()
    session = Session.open(MODEL, [made])
    with pytest.raises(PluginError, match="mine failed in append: MemoryError: no room"):
        answer(session)
    made.on = False
    assert answer(session) == run()


def test_a_cache_misused_by_another_plugin_blames_that_one():
    class Evicts:
        @hookimpl
        def on_step(self, step):
            step.parts[0].seq.caches[0].keep([5, 4])

    with pytest.raises(
        PluginError, match="evicts failed in on_step: ValueError: slots to keep must increase"
    ):
        run(Evicts())


@pytest.mark.parametrize(
    ("pick", "message"),
    [
        (lambda queue: [], r"mine: pick returned \[\] with 1 sequences under way; it returns pairs"),
        (lambda queue: [(queue[0], 0)], "mine: pick returned"),
        (lambda queue: [queue[0]], "mine: pick returned"),
        (lambda queue: [(queue[0], 1), (queue[0], 1)], "mine: pick returned"),
        (lambda queue: [("abc", 1)], "mine: pick returned"),
        (lambda queue: None, "mine: pick returned None"),
        (lambda queue: fails(), "mine failed in pick: LookupError"),
    ],
)
def test_a_scheduler_that_picks_junk(pick, message):
    class Mine:
        on = True

        @hookimpl
        def scheduler(self):
            self.queue = []
            return self

        def add(self, seq):
            self.queue.append(seq)

        def remove(self, seq):
            self.queue.remove(seq)

        def pick(self):
            return pick(self.queue) if self.on else [(self.queue[0], 512)]

    made = Mine()
    session = Session.open(MODEL, [made])
    with pytest.raises(PluginError, match=message):
        answer(session)
    made.on = False
    assert answer(session) == run()


def test_a_failure_ends_the_sequence_it_concerns_and_no_other():
    from tests.toy import Together

    class Mine:
        @hookimpl
        def on_token(self, seq):
            return 5 if seq.n_prompt == 3 and seq.n_new == 4 else None

    session = Session.open(MODEL, [Mine(), Together()])
    requests = [session.request(prompt, max_tokens=12, temp=0.0) for prompt in ("abc", PROMPT)]
    got = {id(request): [] for request in requests}
    with pytest.raises(PluginError, match="mine returned 5 from on_token"):
        for request, token in session.stream(requests):
            got[id(request)].append(token)
    assert got[id(requests[0])] == run(prompt="abc", max_tokens=4)
    assert got[id(requests[1])] == run(max_tokens=12)


@pytest.mark.parametrize("junk", [3, "yes", np.ones(2)])
def test_an_answer_of_on_layer_that_is_no_yes_or_no(junk):
    with pytest.raises(PluginError, match="mine returned .* from on_layer; it returns True, False or None"):
        run(owner(on_layer=junk)())
    assert run(owner(on_layer=lambda self: np.False_)()) == run(owner(on_layer=lambda self: None)()) == run()


def test_errors_that_are_no_plugins_keep_their_kind():
    class Bad(ToyModel):
        def forward(self, plan, step):
            raise FloatingPointError("core")

    with pytest.raises(FloatingPointError, match="^core$"):
        run(Sees(), model=Bad())


# -- explain --


@plugin
class Half:
    """Keep the first layer's K and V in floats."""

    exact = False
    first: int = 1
    scale: float = 0.5

    @hookimpl
    def kv_cache(self, model, layer):
        return LayerCache.factory(model, layer, dtype=np.float32) if layer < self.first else None

    @hookimpl
    def report(self):
        return {"first": self.first}


def test_explain_says_who_owns_what_where():
    plan = Session.open(MODEL, [Half(), Copies()]).plan
    lines = list(explain(plan))
    text = "\n".join(lines)
    assert "half:first=1,scale=0.5: changes tokens" in text
    assert "Keep the first layer's K and V in floats. [kv_cache, report]" in text
    assert any(line.split(maxsplit=1) == ["kv_cache", "0 half; 1-2 built in"] for line in lines)
    assert any(line.split(maxsplit=1) == ["drafter", "copies"] for line in lines)
    assert any(line.split(maxsplit=1) == ["scheduler", "built in"] for line in lines)
    assert not plan.exact and Session.open(MODEL, [Copies()]).plan.exact


def test_predicted_kv_bytes_are_those_that_a_run_takes():
    session = Session.open(ToyModel(context=704), [Half()])
    memory = session.plan.memory
    assert memory.context == 704 and memory.weights == MODEL.file.nbytes
    answer(session, [1] * 700, max_tokens=None)
    assert memory.kv == memory.kv_token * 704
    assert memory.kv <= session.report()["kv_bytes"] <= 1.05 * memory.kv


def test_predicted_activations_are_what_the_forward_pass_allocates(shared):
    import cmr

    with_file = cmr.open_model(shared / "models" / "stories260K-f32.gguf", device="portable")
    session = Session.open(with_file)
    list(session.generate(session.request([1], max_tokens=2, temp=0.0)))
    assert session.plan.memory.activations == with_file._pass._arena.nbytes
