"""NumPy alone: add the spectral term to gradients that you have, in a loop that you own.

Run ``python examples/quickstart_numpy.py``. It trains the same small network twice, without the
term and with it, and prints the largest singular value σ of each weight before and after.
"""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import spectral_core as sc


def gradients(
    weights: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the gradients of the mean cross-entropy of a network with one hidden layer."""
    hidden = np.maximum(x @ weights["hidden"].T, 0)
    logits = hidden @ weights["out"].T
    error = np.exp(logits - logits.max(axis=1, keepdims=True))
    error /= error.sum(axis=1, keepdims=True)
    error[np.arange(len(y)), y] -= 1
    error /= len(y)
    back = (error @ weights["out"]) * (hidden > 0)
    return {"hidden": back.T @ x, "out": error.T @ hidden}


def main(factor: float = 0.03, steps: int = 1000) -> dict[str, float]:
    """Train with λ = ``factor``, and return the largest singular value of each weight."""
    images, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(images / 16, labels, train_size=800, random_state=0)
    rng = np.random.default_rng(0)
    weights = {
        "hidden": rng.normal(0, (2 / 64) ** 0.5, (128, 64)),
        "out": rng.normal(0, (2 / 128) ** 0.5, (10, 128)),
    }
    before = {name: round(float(np.linalg.norm(W, 2)), 2) for name, W in weights.items()}
    state = sc.init(weights)
    for _ in range(steps):
        batch = rng.choice(len(x), 64, replace=False)
        grads = gradients(weights, x[batch], y[batch])
        state = sc.add_gradient_(weights, grads, state, factor=factor)
        for name, weight in weights.items():
            weight -= 0.2 * grads[name]

    logits = np.maximum(test_x @ weights["hidden"].T, 0) @ weights["out"].T
    accuracy = np.mean(logits.argmax(axis=1) == test_y)
    sigmas = {name: float(sigma) for name, sigma in state.sigma.items()}
    after = {name: round(sigma, 2) for name, sigma in sigmas.items()}
    print(f"λ = {factor}: σ before {before}, after {after}; test accuracy {accuracy:.3f}")
    return sigmas


if __name__ == "__main__":
    main(factor=0.0)
    main()
