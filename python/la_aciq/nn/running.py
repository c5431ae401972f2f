"""Which thread is in a model's forward pass, and in which of its modules."""

import threading

from torch import nn


class RunningPass:
    """The hooked modules of a model in whose forward pass a thread is.

    One model serves one thread at a time, because its layers read the ids of the running pass.
    """

    def __init__(self) -> None:
        self._owner: threading.Thread | None = None
        self._modules: list[nn.Module] = []  # the outermost first
        self._lock = threading.Lock()

    def enter(self, module: nn.Module) -> bool:
        """Note that the current thread enters a module's forward pass; whether it is the outermost one.

        Raises:
            RuntimeError: Another thread is in a pass of the model.
        """
        current = threading.current_thread()
        with self._lock:
            # A pass that KeyboardInterrupt broke off never released: its own thread, or anyone after that thread's
            # end, goes on.
            if self._owner not in (None, current) and self._owner.is_alive():
                raise RuntimeError(
                    f"two threads called one quantized model at once ({self._owner.name!r} is in its forward pass): "
                    "each thread needs a copy of the model or a lock around the call"
                )
            if self._owner is not current:
                self._modules.clear()
            self._owner = current
            if module in self._modules:  # the earlier call was interrupted
                del self._modules[self._modules.index(module) :]
            self._modules.append(module)
            return len(self._modules) == 1

    def leave(self, module: nn.Module) -> bool:
        """Note that a module's pass has ended; whether no module is left. False for the pass of another thread."""
        with self._lock:
            if self._owner is not threading.current_thread() or module not in self._modules:
                return False
            del self._modules[self._modules.index(module) :]
            if self._modules:
                return False
            self._owner = None
            return True

    @property
    def outermost(self) -> nn.Module | None:
        """The module whose pass began first, or None."""
        return self._modules[0] if self._modules else None

    def __contains__(self, module: nn.Module | None) -> bool:
        return module in self._modules
