"""Imports of a verb: the decorator torch.compile waits for the first call."""

import gc

import torch

from megatron_hylo.io.start_up import model_imports


def test_functions_decorated_meanwhile_are_compiled_once_when_called(monkeypatch) -> None:
    compiled = []

    def compile_now(function, **settings):
        compiled.append((function.__name__, settings))
        return lambda x: function(x) + 1

    monkeypatch.setattr(torch, "compile", compile_now)
    with model_imports():
        assert not gc.isenabled()

        @torch.compile
        def plain(x: int) -> int:
            """Double."""
            return 2 * x

        @torch.compile(dynamic=True)
        def with_settings(x: int) -> int:
            return 3 * x

        decorator = torch.compile  # as Megatron-Core keeps it
    assert torch.compile is compile_now and gc.isenabled() and compiled == []
    assert plain.__doc__ == "Double." and (plain(1), plain(2), with_settings(1)) == (3, 5, 4)
    assert compiled == [("plain", {}), ("with_settings", {"dynamic": True})]
    assert decorator(with_settings)(1) == 5 and len(compiled) == 3
