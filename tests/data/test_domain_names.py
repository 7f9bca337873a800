import pytest

from a1jax.data import domain_names
from a1jax.data.errors import DataError


@pytest.mark.parametrize(
    ("name", "domain"),
    [
        ("deepswe__", "engineering"),
        ("text_to_sql", "engineering"),
        ("finance_sec_search", "search"),
        ("math_formal_lean", "science"),
        ("verifif", "instruction_following"),
        ("workplace_assistant", "tool_calling"),
        ("tau2", "general"),
        ("nobody_knows", "general"),
        ("mathematics", "general"),  # whole words only
    ],
)
def test_domain_of_an_environment(name, domain):
    assert domain_names.of_environment(name) == domain


def test_index():
    assert [domain_names.index(d) for d in domain_names.DOMAINS] == list(range(6))
    assert domain_names.index("b", ("a", "b")) == 1
    with pytest.raises(DataError, match="unknown domain 'cooking': use one of search"):
        domain_names.index("cooking")


def test_the_embedded_domains_have_names_of_the_paper():
    from a1jax.domains import DOMAINS

    assert set(DOMAINS) <= set(domain_names.DOMAINS)
