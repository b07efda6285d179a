from dataclasses import dataclass

import numpy as np
import pytest

from agents.planning import Recurrent, Root, SearchError, considered_visits, search, with_stop

ACTIONS, DEPTH = 6, 3


class Games:
    """B games of 3 steps and 6 actions, of which some are illegal, others at every node: a random reward for each step,
    a random prior, and as value of a node what the prior earns from there on. An embedding is the path so far."""

    def __init__(self, B, seed=0, legal=0.8, scale=1.0):
        rng = np.random.default_rng(seed)
        shapes = [(B, *[ACTIONS] * d) for d in range(DEPTH)]  # of the nodes at each depth
        self.B, self.mask = B, [rng.random((*s, ACTIONS)) < legal for s in shapes]
        for mask in self.mask:
            mask[..., 2] = True
        self.logits = [scale * rng.standard_normal((*s, ACTIONS)) for s in shapes]
        self.reward = [rng.standard_normal((*s, ACTIONS)) for s in shapes]
        self.value, self.q, self.best = [0.0] * DEPTH, [0.0] * DEPTH, [0.0] * DEPTH
        value, best = np.zeros((B, *[ACTIONS] * DEPTH)), np.zeros((B, *[ACTIONS] * DEPTH))
        for d in reversed(range(DEPTH)):
            self.q[d] = self.reward[d] + value
            self.best[d] = np.where(self.mask[d], self.reward[d] + best, -np.inf)
            value, best = (self.prior(d) * self.q[d]).sum(-1), self.best[d].max(-1)
            self.value[d] = value

    def prior(self, d):
        weight = np.where(self.mask[d], np.exp(self.logits[d]), 0)
        return weight / weight.sum(-1, keepdims=True)

    def root(self, listed=False):
        paths = [()] * self.B if listed else np.full((self.B, DEPTH), -1)
        return Root(self.logits[0], self.value[0], paths, self.mask[0])

    def step(self, paths, action):
        """Takes both kinds of embedding; an illegal action is an AssertionError."""
        listed, rows = isinstance(paths, list), []
        for b, path in enumerate(paths):
            path = tuple(int(a) for a in path if a >= 0)
            d, a = len(path), int(action[b])
            assert self.mask[d][b][path][a], f"illegal: {a} after {path}"
            after, over = (*path, a), d + 1 == DEPTH
            nothing = np.full(ACTIONS, np.nan), np.nan, np.zeros(ACTIONS, bool)  # after the end nobody may look
            here = nothing if over else (self.logits[d + 1][b][after], self.value[d + 1][b][after],
                                         self.mask[d + 1][b][after])  # fmt: skip
            known = after if listed else np.array(after + (-1,) * (DEPTH - d - 1))
            rows.append((self.reward[d][b][path][a], 0.0 if over else 1.0, *here, known))
        columns = [list(column) for column in zip(*rows, strict=True)]
        return Recurrent(*map(np.array, columns[:5]), columns[5] if listed else np.array(columns[5]))


def noise(games, seed=0):
    return np.random.default_rng(seed).gumbel(size=(games.B, ACTIONS))


# *** sequential halving ***


def test_to_stop_is_worth_nothing_and_never_out_of_reach():
    """Rows: STOP alone is legal, so nothing can be had; a loss can be stopped before; a gain is believed."""
    mask = np.array([[False, True], [True, True], [True, False]])
    assert with_stop(np.array([2.5, -1.0, 0.5]), mask).tolist() == [0.0, 0.0, 0.5]


def test_sequential_halving_by_hand():
    """8 actions, 24 simulations, 3 phases of 8: 8 x 1, 4 x 2, 2 x 4 visits."""
    assert considered_visits(8, 24) == [0] * 8 + [1] * 4 + [2] * 4 + [3, 3, 4, 4, 5, 5, 6, 6]
    assert considered_visits(1, 4) == [0, 1, 2, 3]
    assert considered_visits(6, 8) == [0] * 6 + [1] * 2  # fewer simulations than the first phase and half of the next
    assert considered_visits(3, 12) == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4]  # ceil(log2 3) = 2 phases of 6


@dataclass
class Bandit:
    """An action ends the episode and pays `q`."""

    q: np.ndarray  # [B, A]

    def step(self, embedding, action):
        reward = self.q[np.arange(len(action)), action]
        none = np.zeros_like(self.q)
        return Recurrent(reward, np.zeros(len(action)), none, none[:, 0], none > 0, embedding)


def test_a_bandit_by_hand():
    """4 actions, 4 simulations: the top 4 by g + logits, which leaves action 4 out; of 2 phases the first takes 4 / (2 * 4),
    so one visit each, and the simulations are spent. sigma of the best is (50 + 1) / 10 = 5.1."""
    logits = np.log([[0.1, 0.2, 0.3, 0.3, 0.1]])
    gumbel = np.array([[0.0, 0.0, 0.0, 0.0, -9.0]])
    bandit = Bandit(np.array([[0.0, 1.0, 0.5, 0.25, 7.0]]))
    result = search(Root(logits, np.array([0.2]), np.zeros((1, 1)), np.ones((1, 5), bool)), bandit.step, 4, gumbel)
    mixed = (0.2 + 4 * (0.2 * 1 + 0.3 * 0.5 + 0.3 * 0.25) / 0.9) / 5
    assert result.visits.tolist() == [[1, 1, 1, 1, 0]] and result.action.tolist() == [1]
    assert result.q[0] == pytest.approx([0.0, 1.0, 0.5, 0.25, mixed])
    weight = np.exp(logits[0] + 5.1 * result.q[0])
    assert result.policy_target[0] == pytest.approx(weight / weight.sum())
    assert result.value[0] == pytest.approx((0.2 + 0 + 1 + 0.5 + 0.25) / 5)
    unbounded = search(Root(logits, np.array([0.2]), [None], np.ones((1, 5), bool)), bandit.step, 8, considered=2)
    assert sorted(unbounded.visits[0].tolist()) == [0, 0, 0, 4, 4]  # two actions share all


def test_values_are_rescaled_over_the_legal_actions_alone():
    """Both legal actions were visited twice, q 1 and 0.5; what the model thinks of the root, -9, is nobody's q then."""
    root = Root(np.zeros((1, 3)), np.array([-9.0]), [None], np.array([[True, True, False]]))
    step = Bandit(np.array([[1.0, 0.5, 7.0]])).step
    for spread, sigma in ((1e-8, 5.2), (2.0, 5.2 * 0.5 / 2)):
        target = search(root, step, 4, spread=spread).policy_target[0]
        assert target == pytest.approx([1 / (1 + np.exp(-sigma)), 1 / (1 + np.exp(sigma)), 0])


def test_inside_the_tree_visits_follow_the_improved_policy():
    """One action at the root, then a bandit whose arms pay alike: pi' is the prior, and visits go to argmax
    pi - N_a / (1 + N): 0, then 1 (0.5 - 1/2 < 0.3), 2 (0 - ..., 0.3 - 1/3, 0.2 - 0), 0, 0, 1 by hand."""
    prior, only = np.array([[0.5, 0.3, 0.2]]), np.array([[True, False, False]])

    def step(embedding, action):
        if embedding[0] == "root":
            return Recurrent(*np.zeros((1, 1)), np.ones(1), np.log(prior), np.zeros(1), prior > 0, ["inner"])
        return Recurrent(*np.zeros((2, 1)), np.zeros((1, 3)), np.zeros(1), np.zeros((1, 3), bool), ["end"])

    order = []
    for n in range(2, 8):
        visits = search(Root(np.zeros((1, 3)), np.zeros(1), ["root"], only), step, n).tree.visits[0, 1]
        order.append(int(np.argmax(visits - sum((np.eye(3, dtype=int)[a] for a in order), np.zeros(3, int)))))
    assert order == [0, 1, 2, 0, 0, 1]


# *** what the search finds ***


@pytest.mark.parametrize("backup, bar", [("mean", 0.0), ("max", 0.85)])
def test_the_optimum_of_a_game_of_3_steps(backup, bar):
    """100 games of 258 nodes at most, 258 simulations: whether the best of all episodes is among those looked at, and
    whether the action is the first of it. Control: as many steps of episodes sampled from the prior. With mean-backup
    the rule inside the tree looks at few ends again and again (no bar), and yet acts better than the prior."""
    games = Games(100, 1)
    result = search(games.root(), games.step, 258, noise(games, 1), backup=backup)
    best, rng = games.best[0].max(1), np.random.default_rng(2)
    found = np.array([max(leaf.total for leaf in result.leaves(b) if leaf.ended) for b in range(games.B)])
    sampled = np.array([max(sample(games, b, rng) for _ in range(258 // DEPTH)) for b in range(games.B)])
    assert (found <= best + 1e-9).all()
    rate, control = (found > best - 1e-9).mean(), (sampled > best - 1e-9).mean()
    acted = (result.action == games.best[0].argmax(1)).mean()
    prior = (search(games.root(), games.step, 0, noise(games, 1)).action == games.best[0].argmax(1)).mean()
    print(f"Gumbel search, {backup}: bar >= {bar} of optima found, {rate:.2f}, control {control:.2f} (prior); "
          f"bar >= 0.5 of first actions, {acted:.2f}, control {prior:.2f} (prior)")  # fmt: skip
    assert rate >= bar and control < 0.6 and acted >= 0.5 and prior < 0.35


def test_max_backup_ends_with_everything_known():
    """As many simulations as it takes: every optimum found, its value the root's, and without noise acted on."""
    games = Games(100, 1)
    result = search(games.root(), games.step, 600, backup="max")
    best = games.best[0].max(1)
    acted = (result.action == games.best[0].argmax(1)).mean()
    assert np.allclose(result.value, best) and acted >= 0.9


def sample(games, b, rng):
    path, total = (), 0.0
    for d in range(DEPTH):
        a = rng.choice(ACTIONS, p=games.prior(d)[b][path])
        total += games.reward[d][b][path][a]
        path = (*path, int(a))
    return total


@pytest.mark.parametrize("simulations", [2, 4, 16, 50])
def test_it_improves_on_the_prior(simulations):
    """Mean over 2,000 games of q_pi(s, action) - v_pi(s), and the same of the policy target: not below 0. Control: the
    model's rewards and values with the other sign make it worse than the prior."""
    games = Games(2000, simulations, scale=2.0)
    rows = np.arange(games.B)

    def gain(root, step):
        result = search(root, step, simulations, noise(games))
        target = (result.policy_target * games.q[0]).sum(1) - games.value[0]
        return (games.q[0][rows, result.action] - games.value[0]).mean(), target.mean()

    def wrong(embedding, action):
        out = games.step(embedding, action)
        return out._replace(reward=-out.reward, value=-out.value)

    (acted, target), (bad, worse) = gain(games.root(), games.step), gain(games.root(), wrong)
    print(f"Gumbel search, {simulations} simulations: bar gain >= 0, {acted:.2f} (action), {target:.2f} (target), "
          f"control {bad:.2f}, {worse:.2f} (wrong sign)")  # fmt: skip
    assert acted >= 0 and target >= 0 and bad < 0 and worse < 0


# *** the tree ***


@pytest.mark.parametrize("backup", ["mean", "max"])
@pytest.mark.parametrize("simulations", [1, 7, 40])
def test_the_identities_of_a_tree(backup, simulations):
    games = Games(20, 3, legal=0.5)
    result = search(games.root(), games.step, simulations, noise(games), backup=backup)
    t = result.tree
    assert (result.visits.sum(1) == simulations).all() and np.array_equal(result.visits, t.visits[:, 0])
    assert (t.visits[~t.mask] == 0).all() and (t.child[~t.mask] == -1).all()  # never an illegal action
    assert np.array_equal(t.visits > 0, t.child >= 0)
    for b in range(games.B):
        for node in [0, *np.flatnonzero(t.parent[b] >= 0)]:
            path = () if node == 0 else t.leaf(b, node).path
            above, over = t.parent[b, node], len(path) == DEPTH
            if node:
                assert t.child[b, above, t.action[b, node]] == node
                assert t.q[b, above, t.action[b, node]] == t.reward[b, node] + t.discount[b, node] * t.value[b, node]
            if over:
                assert t.value[b, node] == 0 and t.visits[b, node].sum() == 0 and t.discount[b, node] == 0
                continue
            assert np.array_equal(t.mask[b, node], games.mask[len(path)][b][path])  # at every node its own mask
            assert np.allclose(np.exp(t.log_prior[b, node]), games.prior(len(path))[b][path])
            visits, q = t.visits[b, node], t.q[b, node]
            if node:  # visits of a node = 1 + the sum of its children's
                assert t.visits[b, above, t.action[b, node]] == 1 + visits.sum()
            assert t.raw[b, node] == games.value[len(path)][b][path]
            mean = (t.raw[b, node] + (visits * q).sum()) / (1 + visits.sum())
            best = q[visits > 0].max() if visits.any() else t.raw[b, node]
            assert t.value[b, node] == pytest.approx(best if backup == "max" else mean)


def test_leaves_are_all_that_was_looked_at():
    games = Games(5, 4)
    for listed in (False, True):
        result = search(games.root(listed), games.step, 60, noise(games))
        for b in range(games.B):
            leaves = result.leaves(b)
            assert len({leaf.path for leaf in leaves}) == len(leaves) == (result.tree.child[b] >= 0).sum()
            for leaf in leaves:
                known = tuple(int(a) for a in leaf.embedding if a >= 0)
                assert known == leaf.path and leaf.ended == (len(leaf.path) == DEPTH)
                steps = [games.reward[d][b][leaf.path[:d]][a] for d, a in enumerate(leaf.path)]
                assert leaf.total == pytest.approx(sum(steps))


def assert_same(a, b, order=slice(None)):
    """Two results, of which the second one's actions stand in another order."""
    assert np.array_equal(np.arange(ACTIONS)[order][b.action] if isinstance(order, np.ndarray) else b.action, a.action)
    assert np.array_equal(a.visits[:, order], b.visits) and np.allclose(a.value, b.value, atol=1e-9)
    assert np.allclose(a.policy_target[:, order], b.policy_target, atol=1e-9)
    assert np.allclose(a.q[:, order], b.q, atol=1e-9)


@pytest.mark.parametrize("backup", ["mean", "max"])
def test_what_changes_nothing(backup):
    games, other, g = Games(30, 5), Games(30, 5), noise(Games(30), 5)
    plain = search(games.root(), games.step, 40, g, backup=backup)
    assert_same(
        plain, search(games.root(listed=True), games.step, 40, g, backup=backup)
    )  # what an embedding is made of
    other.logits = [x + 3 for x in games.logits]  # a constant added to the logits
    assert_same(plain, search(other.root(), other.step, 40, g + 2, backup=backup))
    for d in range(DEPTH):  # actions by other names
        for name in ("mask", "logits", "reward"):
            x = getattr(games, name)[d]
            for axis in range(1, x.ndim):
                x = np.take(x, np.array([3, 0, 5, 1, 4, 2]), axis)
            getattr(other, name)[d] = x
        for axis in range(1, d + 1):
            other.value[d] = np.take(other.value[d], np.array([3, 0, 5, 1, 4, 2]), axis)
    order = np.array([3, 0, 5, 1, 4, 2])
    assert_same(plain, search(other.root(), other.step, 40, g[:, order], backup=backup), order)
    for name in ("logits", "reward"):  # what stands at illegal actions
        for x, mask in zip(getattr(games, name), games.mask, strict=True):
            x[~mask] = np.nan
    assert_same(plain, search(games.root(), games.step, 40, g, backup=backup))


def test_a_batch_is_its_rows_one_by_one():
    games, g = Games(6, 6), noise(Games(6), 6)
    whole = search(games.root(), games.step, 30, g)
    for b in range(games.B):
        one = Games(6, 6)
        one.B = 1
        for name in ("mask", "logits", "reward", "value"):
            setattr(one, name, [x[b : b + 1] for x in getattr(games, name)])
        alone = search(one.root(), one.step, 30, g[b : b + 1])
        assert alone.action[0] == whole.action[b] and np.array_equal(alone.visits[0], whole.visits[b])
        assert np.allclose(alone.policy_target[0], whole.policy_target[b]) and alone.value.shape == (1,)


def test_zero_simulations_act_by_the_prior():
    games, g = Games(50, 7), noise(Games(50), 7)
    result = search(games.root(), None, 0, g)
    assert np.array_equal(result.action, np.where(games.mask[0], games.logits[0] + g, -np.inf).argmax(1))
    assert np.allclose(result.policy_target, games.prior(0)) and np.allclose(result.value, games.value[0])
    assert not result.visits.any() and result.leaves(0) == [] and result.action.dtype == np.int32
    greedy = search(games.root(), None, 0)
    assert np.array_equal(greedy.action, np.where(games.mask[0], games.logits[0], -np.inf).argmax(1))


def test_a_single_legal_action_and_more_simulations_than_nodes():
    games = Games(4, 8, legal=0.0)
    result = search(games.root(), games.step, 9, noise(games))
    assert (result.action == 2).all() and result.visits[:, 2].tolist() == [9] * 4
    assert np.allclose(result.policy_target, np.eye(6)[2]) and len(result.leaves(0)) == 3
    assert np.isfinite(result.value).all()


def test_nothing_is_asked_below_an_end():
    """Rows whose episode ends there are visited again without a new node; when all are, nobody is asked."""
    asked = []
    bandit = Bandit(np.array([[1.0, 0.0]]))

    def step(embedding, action):
        asked.append(int(action[0]))
        return bandit.step(embedding, action)

    result = search(Root(np.zeros((1, 2)), np.zeros(1), [None], np.ones((1, 2), bool)), step, 10)
    assert sorted(asked) == [0, 1] and result.visits.sum() == 10 and result.value[0] == pytest.approx(5 / 11)


# *** what is refused ***


def test_what_cannot_be_searched_is_named():
    games = Games(4, 9)
    root = games.root()

    def damaged(x, at, value):
        x = x.copy()
        x[at] = value
        return x

    for changed, complaint in (
        ({"mask": damaged(root.mask, 2, False)}, "row 2: no action is legal at node 0"),
        ({"prior_logits": damaged(root.prior_logits, (3, 2), np.nan)}, "row 3: prior_logits is not finite"),
        ({"prior_logits": damaged(root.prior_logits, (3, 2), np.inf)}, "row 3: prior_logits is not finite"),
        ({"value": damaged(root.value, 1, np.nan)}, "row 1: value is not finite"),
        ({"mask": root.mask.astype(np.float32)}, "must be bool"),
        ({"mask": root.mask[:, :-1]}, "must be bool"),
    ):
        with pytest.raises(SearchError, match=complaint):
            search(root._replace(**changed), games.step, 4)


@pytest.mark.parametrize("name, complaint", [
    ("reward", "row 1: reward"), ("discount", "row 1: discount"), ("prior_logits", "row 1: prior_logits"),
    ("value", "row 1: value"), ("mask", "row 1: no action is legal at node 1"),
])  # fmt: skip
def test_a_models_answer_that_cannot_be_searched_is_named(name, complaint):
    games = Games(3, 10)

    def step(embedding, action):
        out = games.step(embedding, action)
        x = getattr(out, name).copy()
        x[1] = False if name == "mask" else np.nan
        return out._replace(**{name: x})

    with pytest.raises(SearchError, match=complaint):
        search(games.root(), step, 2)
