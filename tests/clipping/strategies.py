"""Hypothesis strategies for laws."""

from hypothesis import strategies as st

from la_aciq.clipping import Gaussian, GeneralizedGaussian, Laplace, Logistic, Mixture, StudentT, Uniform


@st.composite
def laws(draw):
    kind = draw(st.sampled_from(["gaussian", "laplace", "logistic", "uniform", "t", "gg", "mixture"]))
    sigma = draw(st.floats(0.01, 100))
    mean = draw(st.sampled_from([0.0, 0.0, 0.5, -2.0])) * sigma
    if kind == "t":
        return StudentT(draw(st.floats(2.05, 50)), sigma, mean)
    if kind == "gg":
        return GeneralizedGaussian(draw(st.floats(0.4, 12)), sigma, mean)
    if kind == "mixture":
        w = draw(st.floats(0.05, 0.95))
        return Mixture([Gaussian(sigma, mean), Laplace(sigma * draw(st.floats(0.1, 10)))], [w, 1 - w])
    return {"gaussian": Gaussian, "laplace": Laplace, "logistic": Logistic, "uniform": Uniform}[kind](sigma, mean)
