"""Shards on a real Ray cluster of two nodes on this machine, of which one is lost in the middle."""

import pytest

from fastddpm.checkpoints import load_checkpoint
from fastddpm.sampler import Sampler
from fastddpm.shards.maker import Recipe
from fastddpm.shards.plan import Plan
from fastddpm.shards.store import Store
from fastddpm.shards.worker import Done
from tests.command_line import refused
from tests.shards.runs import RECIPE, Silent, maker, tree, work
from tests.tiny import save_checkpoint

ray = pytest.importorskip("ray", reason="needs ray")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def recipe(n, size):
    return Recipe(Plan(n, size), method=RECIPE.method, classes=(2, 0, 1), batch_size=5)


def sampler_of(model):
    checkpoint = load_checkpoint(model)
    sampler = Sampler(checkpoint.network, checkpoint.schedule, checkpoint.spec, device="cpu", engine="eager")
    sampler.checkpoint = checkpoint
    return sampler


class Losing(Silent):
    """Kills a node of the cluster when the first shard is there, and lets another one join three shards later."""

    def __init__(self, cluster, node):
        super().__init__()
        self.cluster, self.node, self.shards = cluster, node, 0

    def there(self, pictures):
        super().there(pictures)
        self.shards += 1
        if self.shards == 1:
            self.cluster.remove_node(self.node, allow_graceful=False)
        elif self.shards == 4:
            self.cluster.add_node(num_cpus=1)


def test_a_node_is_lost_and_another_one_joins(cluster, model, tmp_path):
    from fastddpm.shards.ray_cluster import draw_on_ray

    losing = Losing(cluster, cluster.add_node(num_cpus=1))
    cluster.wait_for_nodes()
    store, asked = Store(str(tmp_path / "out")), recipe(120, 10)
    done = draw_on_ray(cluster.address, sampler_of(model), asked, store, losing, cpus=1)
    assert done == Done(12, 0, 120) and losing.pictures == 120 and losing.shards == 12
    work(maker(tmp_path / "plain", sampler=sampler_of(model), plan=asked.plan, batch_size=5, seed=0))
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")
    again = draw_on_ray(cluster.address, sampler_of(model), asked, store, Silent(), cpus=1)
    assert again == Done()


def test_the_command_line_and_what_the_actors_refuse(cluster, fastddpm, model, place):
    usual = ["sample", model, "-n", 8, "--steps", 2, "--shards", "out", "--shard-size", 4, "--ray", cluster.address]
    done = fastddpm(*usual, "--cpus-per-worker", 1)
    assert (done.code, done.out) == (0, "wrote 2 shards (8 pictures) to out; all 2 are there\n")
    refused(fastddpm(*usual, "--seed", 1), "out holds a run with other settings: seed was 0, is 1; use another place")


def test_a_cluster_that_is_not_there(fastddpm, model, place):
    ray.shutdown()
    refused(
        fastddpm("sample", model, "--shards", "out", "--ray", "127.0.0.1:1"),
        "--ray must be a Ray cluster's address, got '127.0.0.1:1'",
    )
