"""Citations over the wire: the quickstart's base is asked about an uploaded file through the official SDK."""

from ropewalk.config.serving import EngineOptions, Serving
from ropewalk.files.settings import Settings
from ropewalk.quickstart import facts
from ropewalk.quickstart.run import BASE
from ropewalk.registry import Registry
from ropewalk.server.settings import ServerSettings
from server.conftest import running


def test_a_file_is_cited_at_its_offsets_streamed_and_whole_and_the_reply_can_be_sent_back(root_key, tmp_path):
    Registry(tmp_path / "registry").publish_base("reader", BASE)
    country = facts.split()[1][0]
    text = facts.document(country)
    settings = ServerSettings(serving=Serving(engine=EngineOptions(threads=1)))
    with (
        running(tmp_path, Settings(data=tmp_path), settings) as server,
        server.sdk(default_headers={"anthropic-version": "2023-06-01"}) as sdk,
    ):
        file = sdk.beta.files.upload(file=("country.txt", text.encode(), "text/plain"))
        document = {"type": "document", "source": {"type": "file", "file_id": file.id}, "citations": {"enabled": True}}
        turns = [{"role": "user", "content": [document, {"type": "text", "text": f"What is the capital of {country.name}?"}]}]
        asked = {"model": "reader", "max_tokens": 20, "messages": turns, "extra_body": {"temperature": 0}}

        whole = sdk.messages.create(**asked)
        (block,) = whole.content
        assert block.text == country.capital
        (cited,) = block.citations
        assert (cited.type, cited.document_index, cited.document_title, cited.file_id) == ("char_location", 0, None, file.id)
        assert text[cited.start_char_index : cited.end_char_index] == cited.cited_text
        assert country.capital in cited.cited_text

        with sdk.messages.stream(**asked) as stream:
            kinds = [event.delta.type for event in stream if event.type == "content_block_delta"]
            final = stream.get_final_message()
        assert kinds[-1] == "citations_delta"
        assert set(kinds[:-1]) == {"text_delta"}
        assert final.content[0].to_dict() == block.to_dict()
        assert final.usage.cache_read_input_tokens > final.usage.input_tokens

        turns += [{"role": "assistant", "content": [block.to_dict()]}, {"role": "user", "content": "What is the population?"}]
        second = sdk.messages.create(**asked)
        assert second.content[0].text == f"{country.population:,}"
        assert second.content[0].text in second.content[0].citations[0].cited_text
        assert second.usage.cache_read_input_tokens >= final.usage.cache_read_input_tokens
