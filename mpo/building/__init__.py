"""From prompts to preference groups in every language, made with the model that is trained."""
