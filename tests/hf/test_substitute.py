"""Functions that stand in for modules' forwards are seen by one thread alone."""

import threading

import pytest
from torch import nn

from trimkv.hf.substitute import stock, substituted


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def test_other_threads_see_the_stock_function():
    module, seen, inside, go_on = Twice(), [], threading.Event(), threading.Event()

    def other():
        inside.wait(5)
        seen.append(module(1))
        with substituted([(module, lambda x: 7 * x)]):
            seen.append(module(1))
        seen.append(module(1))
        go_on.set()

    thread = threading.Thread(target=other)
    thread.start()
    with substituted([(module, lambda x: stock(module)(x) + 1)]):
        inside.set()
        assert go_on.wait(5)
        assert module(1) == 3
    thread.join()
    assert seen == [2, 7, 2] and module(1) == 2 and "forward" not in vars(module)


def test_substitutes_nest_and_go_whatever_happens():
    module = Twice()
    with pytest.raises(RuntimeError), substituted([(module, lambda x: 0)]):
        assert module(1) == 0
        with substituted([(module, lambda x: 1)]):
            assert module(1) == 1
        assert module(1) == 0
        raise RuntimeError
    assert module(1) == 2 and "forward" not in vars(module)


def test_a_forward_that_a_module_has_of_its_own_comes_back():
    """As accelerate puts it there for modules on several devices."""
    module = Twice()
    module.forward = own = lambda x: 5 * x
    with substituted([(module, lambda x: stock(module)(x) + 1)]):
        assert module(1) == 6
    assert module.forward is own
