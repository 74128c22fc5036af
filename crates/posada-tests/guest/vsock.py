# The guest's end of the vsock tests: `serve PORT` answers each connection with what it sends, and the end of it by its own;
# `ask PORT` sends a megabyte to the host and reads an answer.
import hashlib, socket, sys

HOST = 2
what, port = sys.argv[1], int(sys.argv[2])


def serve(connection):
    count, hash = 0, hashlib.sha256()
    while data := connection.recv(65536):
        connection.sendall(data)
        hash.update(data)
        count += len(data)
    connection.sendall(f"{count} {hash.hexdigest()}\n".encode())
    connection.close()


if what == "serve":
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, port))
    listener.listen()
    print("serving", flush=True)
    while True:
        serve(listener.accept()[0])
elif what == "ask":
    connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    connection.connect((HOST, port))
    connection.sendall(b"0123456789abcdef" * 65536)
    connection.shutdown(socket.SHUT_WR)
    answer = b""
    while data := connection.recv(65536):
        answer += data
    print(answer.decode())
elif what == "wait":
    connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    connection.connect((HOST, port))
    try:
        print("got", connection.recv(100))
    except ConnectionResetError:
        print("reset")
