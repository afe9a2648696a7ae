"""A client that trains nothing: the arrays that came go back, so that a round is all overhead."""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Return the arrays as they came."""
    return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)
