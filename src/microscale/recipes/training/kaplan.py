"""How many steps a model should be trained for: the compute-efficient rule of 2001.08361.

L(N, S) = (Nc / N)^aN + (Sc / Smin)^aS for N parameters without embeddings, trained for Smin steps
of batches that are very large. Compute is spent best where L is (1 + aN / aS) times what the model
would converge to (its appendix B), about 10 % above. Batches of B tokens take
S = Smin (1 + Bcrit / B) steps, where Bcrit(L) = B* / L^(1 / aB) tokens. Constants are those of its
Table 3 and its text.
"""

from dataclasses import dataclass

A_N, N_C = 0.077, 6.5e13
A_S, S_C = 0.76, 2.1e3
A_B, B_STAR = 0.21, 2.0e8


@dataclass(frozen=True, slots=True)
class Reckoning:
    """The rule for one model and one batch size, step by step.

    Attributes:
        parameters: N, without embeddings.
        batch_tokens: B.
        converged: the loss that the model would converge to, (Nc / N)^aN.
        target: the loss to stop at. Losses are of Kaplan's data and tokens, not of yours.
        least_steps: Smin.
        critical_batch: Bcrit at the target, in tokens.
        steps: S, rounded up.
    """

    parameters: int
    batch_tokens: int
    converged: float
    target: float
    least_steps: float
    critical_batch: float
    steps: int

    @property
    def tokens(self) -> int:
        """Tokens that are seen."""
        return self.steps * self.batch_tokens

    @property
    def operations(self) -> float:
        """Floating-point operations, 6 N a token."""
        return 6.0 * self.parameters * self.tokens

    def __str__(self) -> str:
        """Return the reckoning as text."""
        return (
            f"steps by Kaplan et al. (2001.08361), N = {self.parameters:,} without embeddings:\n"
            f"  converged loss  (Nc / N)^aN = {self.converged:.3f}; "
            f"stop at {1 + A_N / A_S:.3f} times it = {self.target:.3f}\n"
            f"  Smin = Sc / (difference)^(1 / aS) = {self.least_steps:,.0f}; "
            f"Bcrit = B* / L^(1 / aB) = {self.critical_batch:,.0f} tokens\n"
            f"  S = Smin (1 + Bcrit / {self.batch_tokens:,}) = {self.steps:,} steps, "
            f"{self.tokens:.3g} tokens, {self.operations:.3g} operations"
        )


def reckon(parameters: int, batch_tokens: int) -> Reckoning:
    """Reckon the steps of a model of that many parameters without embeddings."""
    converged = (N_C / parameters) ** A_N
    target = (1 + A_N / A_S) * converged
    least = S_C / (target - converged) ** (1 / A_S)
    critical = B_STAR / target ** (1 / A_B)
    steps = -int(-least * (1 + critical / batch_tokens) // 1)
    return Reckoning(parameters, batch_tokens, converged, target, least, critical, steps)
