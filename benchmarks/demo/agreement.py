"""Do the backends agree? The same short trainings on each: python -m benchmarks.demo.agreement."""

from __future__ import annotations

from rich.console import Console

from .data import digits
from .report import new_table
from .train import BACKENDS, METHODS, RATES, backend, plan, train

EPOCHS = 10


def main() -> None:
    data = digits()
    table = new_table(
        f"Test accuracy after {EPOCHS} epochs, in percent", "batch", "method", *BACKENDS, "spread"
    )
    for batch in RATES:
        for method in METHODS:
            chosen = plan(data, method, batch, seed=0, epochs=EPOCHS)
            accuracies = [
                100 * train(backend(name), data, method, chosen, lambda: None).test[-1]
                for name in BACKENDS
            ]
            cells = [f"{accuracy:.2f}" for accuracy in accuracies]
            spread = max(accuracies) - min(accuracies)
            table.add_row(str(batch), method, *cells, f"{spread:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
