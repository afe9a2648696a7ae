r"""Wire messages, version 1. The ``*_pb2*`` files are generated and committed; from the repository's root::

    cd protocols
    python -m grpc_tools.protoc -I . --python_out=. foedus_protocols/v1/envelope.proto
    python -m grpc_tools.protoc -I . --python_out=. --grpc_python_out=. \
        foedus_protocols/v1/link.proto foedus_protocols/v1/enrolment.proto
"""
