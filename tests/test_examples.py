"""The examples do what they say."""

from examples import your_own_loop


def test_your_own_loop_learns_to_count():
    assert your_own_loop.main().tolist() == [list(range(7, 20))]
