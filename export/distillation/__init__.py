"""The student: a small model that is distilled from the mixture.

`distill.distill` does everything from a recipe. An export calls, when the bundle's graphs and weights are complete:

    distill.make_student(
        recipe: Recipe,               # with recipe.student
        weights: Mapping[str, float], # weights by member name, fitted or given
        teacher: Teacher,             # the mixture, from its graphs or its torch models
        folder: Path,                 # kept between calls: the teacher's cache, the checkpoint and the model
        progress: Progress = NO_PROGRESS,
    ) -> Path                         # folder / "model": a Hugging Face folder with the tokenizer, fp32

The same call resumes an interrupted one, and returns at once when everything is done.
"""
